"""A damaged checkpoint is refused with the file's name and the fault, whether or not its digests match."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct

import pytest
import safetensors.torch
import torch

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import CheckpointError, CorruptCheckpoint
from loraf.manifest import Module, StoredFile
from loraf.matrices import projection
from tests.loraf import small_checkpoints as small
from tests.loraf.small_checkpoints import RANK, SHAPES, TASKS, UP, Q

pytestmark = pytest.mark.usefixtures("with_and_without_library")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    small.make(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "ckpt")


def refusal(folder, *files: str, says: str = "") -> CorruptCheckpoint:
    """Opening and streaming fail with the same problems, which name exactly these tasks' files."""
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    with pytest.raises(CorruptCheckpoint) as streaming, CheckpointStream.open(folder) as checkpoint:
        checkpoint.finish()
    assert streaming.value.problems == caught.value.problems
    named = {problem.file for problem in caught.value.problems}
    assert named == {str(small.task_file(folder, name)) for name in files}
    assert says in str(caught.value)
    assert all(problem.remedy for problem in caught.value.problems)
    return caught.value


# --- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_flipped_bit_of_every_task_file_is_detected(folder):
    """Flips one bit at 60 places of each file, including the first and the last byte."""
    for name in TASKS:
        file = small.task_file(folder, name)
        whole = file.read_bytes()
        for i in sorted({0, 7, 8, len(whole) - 1, *range(11, len(whole), len(whole) // 60)}):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            refusal(folder, name, says="its SHA-256 differs")
        file.write_bytes(whole)
    Checkpoint.open(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(folder, length):
    file = small.task_file(folder, "nlu")
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    refusal(folder, "nlu", says=f"({len(whole[:length])} bytes, {len(whole)} expected)")


def test_a_file_with_extra_bytes_is_refused(folder):
    file = small.task_file(folder, "nlu")
    file.write_bytes(file.read_bytes() + b"\0")
    refusal(folder, "nlu", says="bytes")


def test_a_missing_file_or_a_folder_in_its_place_is_refused(folder):
    small.task_file(folder, "nlu").unlink()
    refusal(folder, "nlu", says="No such file")
    small.task_file(folder, "nlu").mkdir()
    refusal(folder, "nlu", says="Is a directory")


def test_swapped_files_are_refused(folder):
    math, nlu = small.task_file(folder, "math"), small.task_file(folder, "nlu")
    math.rename(folder / "x")
    nlu.rename(math)
    (folder / "x").rename(nlu)
    refusal(folder, "math", "nlu")


def test_several_damaged_files_are_all_named(folder):
    small.task_file(folder, "math").unlink()
    small.task_file(folder, "nlu").write_bytes(b"x")
    small.rewrite(folder, "code", lambda tensors: tensors[f"{Q}.values"].fill_(float("nan")))
    error = refusal(folder, *TASKS, says="not finite")
    assert len(error.problems) == 3


def test_files_that_are_not_in_the_manifest_are_ignored(folder):
    """Such as those that a killed save leaves behind, or that a user adds."""
    (folder / "tasks" / ".nlu.safetensors.123.tmp").write_bytes(b"half")
    (folder / ".loraf.json.123.tmp").write_bytes(b"{")
    (folder / "tasks" / "orphan.safetensors").write_bytes(b"x")
    (folder / "README").write_text("mine")
    assert Checkpoint.open(folder).manifest.task_names == TASKS


# --- content, with digests that fit -----------------------------------------------------------------------------


def test_the_helpers_write_valid_files_too(folder):
    """Otherwise the tests below could pass for the wrong reason."""
    small.rewrite(folder, "nlu", lambda tensors: None)
    assert Checkpoint.open(folder).manifest.task_names == TASKS


def header_of(entries: dict) -> bytes:
    """Returns a safetensors file with this header and 64 bytes of data."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x80\x04K\x01.",  # a pickle
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b"{" * 9,
        header_of({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}),
        header_of({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 6400]}}),
        header_of({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}),
        header_of({"a": {"dtype": "XX", "shape": [16], "data_offsets": [0, 64]}}),
    ],
)
def test_a_file_that_is_not_in_the_safetensors_format_is_refused(folder, data):
    small.rewrite_bytes(folder, "nlu", data)
    refusal(folder, "nlu", says="is not a safetensors file")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "x.rows", "", f"{Q}.rows.rows", Q])
def test_an_additional_tensor_is_refused(folder, name):
    outside = small.snapshot(folder.parent)

    def add(tensors):
        tensors[name] = torch.zeros(3)

    small.rewrite(folder, "nlu", add)
    refusal(folder, "nlu", says=f"holds other tensors than the manifest lists ({name})")
    assert small.snapshot(folder.parent).keys() == outside.keys()


@pytest.mark.parametrize("part", ["rows", "cols", "values"])
def test_a_missing_tensor_is_refused(folder, part):
    small.rewrite(folder, "nlu", lambda tensors: tensors.pop(f"{UP}.{part}"))
    refusal(folder, "nlu", says=f"{UP}.{part}")


def replace(part: str, change):
    """Returns a function that changes one tensor of module UP."""

    def apply(tensors):
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"].clone())

    return apply


def put(index: int, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def swap_two(tensors):
    for part in ("rows", "cols", "values"):
        tensor = tensors[f"{UP}.{part}"]
        tensors[f"{UP}.{part}"] = tensor[[1, 0, *range(2, len(tensor))]]


def repeat_first(tensors):
    for part in ("rows", "cols"):
        tensors[f"{UP}.{part}"][1] = tensors[f"{UP}.{part}"][0]


def all_parts(change):
    def apply(tensors):
        for part in ("rows", "cols", "values"):
            tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()

    return apply


FAULTS = {
    "unsorted": (swap_two, "not unique and sorted"),
    "a position twice": (repeat_first, "not unique and sorted"),
    "a row outside": (replace("rows", put(-1, SHAPES[UP][0])), "a row lies outside"),
    "a column outside": (replace("cols", put(-1, RANK)), "a column lies outside"),
    "the largest index": (replace("cols", put(-1, 255)), "a column lies outside"),
    "NaN": (replace("values", put(0, float("nan"))), "a value is not finite"),
    "infinity": (replace("values", put(5, -float("inf"))), "a value is not finite"),
    "one position less": (all_parts(lambda t: t[:-1]), "positions, but K is"),
    "no position": (all_parts(lambda t: t[:0]), "has 0 positions, but K is"),
    "a value less": (replace("values", lambda t: t[:-1].clone()), "not three vectors"),
    "a matrix": (all_parts(lambda t: t.reshape(1, -1)), "not three vectors"),
    "scalars": (all_parts(lambda t: t[0]), "not three vectors"),
    "wide rows": (replace("rows", lambda t: t.to(torch.int64)), "smallest index dtype"),
    "signed columns": (replace("cols", lambda t: t.to(torch.int8)), "smallest index dtype"),
    "floating rows": (replace("rows", lambda t: t.to(torch.float32)), "smallest index dtype"),
    "float32 values": (replace("values", lambda t: t.float()), "torch.float32, but the manifest says bfloat16"),
    "float64 values": (replace("values", lambda t: t.double()), "values are torch.float64"),
    "float8 values": (replace("values", lambda t: t.to(torch.float8_e4m3fn)), "values are torch.float8_e4m3fn"),
    "complex values": (replace("values", lambda t: t.to(torch.complex64)), "values are torch.complex64"),
    "boolean values": (replace("values", lambda t: t != 0), "values are torch.bool"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_content_is_refused_by_file_and_module(folder, fault):
    change, says = FAULTS[fault]
    small.rewrite(folder, "nlu", change)
    error = refusal(folder, "nlu", says=says)
    assert [problem.field for problem in error.problems] == [UP]


def test_overlapping_masks_are_refused(folder):
    """nlu owns one position of math in one module."""
    math = safetensors.torch.load(small.task_file(folder, "math").read_bytes())

    def steal(tensors):
        owned = set(zip(tensors[f"{UP}.rows"].tolist(), tensors[f"{UP}.cols"].tolist(), strict=True))
        stolen = (int(math[f"{UP}.rows"][0]), int(math[f"{UP}.cols"][0]))
        kept = sorted([*sorted(owned)[1:], stolen])
        tensors[f"{UP}.rows"] = torch.tensor([row for row, _ in kept], dtype=torch.uint8)
        tensors[f"{UP}.cols"] = torch.tensor([col for _, col in kept], dtype=torch.uint8)

    small.rewrite(folder, "nlu", steal)
    refusal(folder, "nlu", says="task 'nlu' holds 1 positions of task 'math'")
    Checkpoint.open(folder, ["nlu", "code"])  # these do not overlap


def test_a_copied_task_overlaps_everywhere(folder):
    small.rewrite_bytes(folder, "code", small.task_file(folder, "math").read_bytes())
    error = refusal(folder, "code", says="positions of task 'math'")
    assert {problem.field for problem in error.problems} == set(SHAPES)


def test_a_manifest_with_another_k_sparsity_or_rank_does_not_fit_the_files(folder):
    manifest = manifests.read(folder)
    for sparsity, rank in ((0.7, RANK), (0.8, RANK * 2)):
        k = {m: manifests.positions_per_matrix(sparsity, shape[0], rank) for m, shape in SHAPES.items()}
        tasks = tuple(dataclasses.replace(task, k=k, sparsity=sparsity) for task in manifest.tasks)
        small.write_manifest(folder, dataclasses.replace(manifest, rank=rank, tasks=tasks))
        refusal(folder, *TASKS, says="positions, but K is")


def test_a_manifest_with_another_dtype_does_not_fit_the_files(folder):
    manifest = manifests.read(folder)
    tasks = tuple(dataclasses.replace(task, dtype="float16") for task in manifest.tasks)
    small.write_manifest(folder, dataclasses.replace(manifest, tasks=tasks))
    refusal(folder, *TASKS, says="the manifest says float16")


def test_a_file_of_the_wrong_size_is_refused_although_its_digest_matches(folder):
    manifest = manifests.read(folder)
    stored = manifest.tasks[0].file
    odd = dataclasses.replace(manifest.tasks[0], file=StoredFile(stored.path, stored.bytes + 1, stored.sha256))
    small.write_manifest(folder, dataclasses.replace(manifest, tasks=(odd, *manifest.tasks[1:])))
    refusal(folder, "math", says="expected")


# --- the projection ---------------------------------------------------------------------------------------------


def refused_projection(checkpoint: Checkpoint, modules=tuple(SHAPES)) -> None:
    """Both ways to obtain A fail, and name every module."""
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoint.verify_projection()
    assert {p.field for p in caught.value.problems} == {f"modules.{m}.projection_sha256" for m in modules}
    assert all(manifests.FILE_NAME in problem.file for problem in caught.value.problems)
    for module in modules:
        with pytest.raises(CorruptCheckpoint, match="is not the A that the tasks were trained with"):
            checkpoint.projection_of(module)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": -1}, {"seed": 2**64}, {"init_std": 0.1179}, {"init_std": 1.0}]
)
def test_another_seed_or_deviation_is_refused(folder, change):
    manifest = manifests.read(folder)
    changed = dataclasses.replace(manifest.projection, **change)
    small.write_manifest(folder, dataclasses.replace(manifest, projection=changed))
    refused_projection(Checkpoint.open(folder))


def test_the_default_deviation_written_as_a_number_is_accepted(folder):
    """The number 1/√(3·24) gives the same A as the default."""
    manifest = manifests.read(folder)
    changed = dataclasses.replace(manifest.projection, init_std=projection.default_std(24))
    small.write_manifest(folder, dataclasses.replace(manifest, projection=changed))
    Checkpoint.open(folder).verify_projection()


def test_another_width_is_refused(folder):
    manifest = manifests.read(folder)
    modules = manifest.modules | {UP: dataclasses.replace(manifest.modules[UP], d_in=25)}
    small.write_manifest(folder, dataclasses.replace(manifest, modules=modules))
    refused_projection(Checkpoint.open(folder), (UP,))


def test_another_rank_is_refused(tmp_path):
    """Without tasks, only the projection reveals it."""
    small.make(tmp_path, tasks=())
    small.write_manifest(tmp_path, dataclasses.replace(manifests.read(tmp_path), rank=RANK + 1))
    refused_projection(Checkpoint.open(tmp_path))


def test_swapped_names_are_refused(folder):
    """A is keyed by the module's name."""
    manifest = manifests.read(folder)
    old = manifest.modules
    modules = {
        Q: Module(old[Q].d_out, old[Q].d_in, old[UP].projection_sha256),
        UP: Module(old[UP].d_out, old[UP].d_in, old[Q].projection_sha256),
    }
    combined = projection.combined_digest({name: m.projection_sha256 for name, m in modules.items()})
    changed = dataclasses.replace(manifest.projection, sha256=combined)
    small.write_manifest(folder, dataclasses.replace(manifest, modules=modules, projection=changed))
    refused_projection(Checkpoint.open(folder))


def test_another_generator_is_refused_before_anything_is_read(folder):
    manifest = manifests.read(folder)
    changed = dataclasses.replace(manifest.projection, generator="mersenne")
    small.write_manifest(folder, dataclasses.replace(manifest, projection=changed))
    small.task_file(folder, "math").unlink()
    with pytest.raises(CheckpointError, match="'mersenne' is unknown") as caught:
        Checkpoint.open(folder)
    assert [problem.field for problem in caught.value.problems] == ["projection.generator"]


def test_a_combined_digest_that_does_not_match_the_modules_is_refused(folder):
    """The adapter digest covers it, so it must match the modules' digests."""
    manifest = manifests.read(folder)
    changed = dataclasses.replace(manifest.projection, sha256="0" * 64)
    small.write_manifest(folder, dataclasses.replace(manifest, projection=changed))
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    assert [problem.field for problem in caught.value.problems] == ["projection.sha256"]
