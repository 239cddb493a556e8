"""A checkpoint returns what was stored. Invalid content is refused, and then nothing is written."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError, CorruptCheckpoint, UnknownTask
from loraf.manifest import Templates, positions_per_matrix
from loraf.matrices import projection
from loraf.matrices.sparse import SparseB, index_dtype
from tests.loraf import small_checkpoints as small
from tests.loraf.small_checkpoints import BASE, RANK, SHAPES, SPARSITY, TASKS, UP, Q
from tests.standins import random_values


def same(left: dict[str, SparseB], right: dict[str, SparseB]) -> bool:
    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
        a, b = (t.view(bits.get(t.dtype, t.dtype)).to(torch.int64) for t in (a, b))
        return torch.equal(a, b)

    return left.keys() == right.keys() and all(
        left[m].shape == right[m].shape
        and all(getattr(left[m], p).dtype == getattr(right[m], p).dtype for p in ("rows", "cols", "values"))
        and all(equal(getattr(left[m], p), getattr(right[m], p)) for p in ("rows", "cols", "values"))
        for m in left
    )


# --- round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip(tmp_path, dtype):
    made = small.make(tmp_path, dtype=dtype)
    opened = Checkpoint.open(tmp_path)
    assert opened.manifest == made.manifest == manifests.read(tmp_path)
    drawn = small.values(dtype=dtype)
    for task in TASKS:
        assert same(opened.tasks[task], drawn[task])
        assert same(made.tasks[task], drawn[task])
    assert [t.dtype for t in opened.manifest.tasks] == [str(dtype).removeprefix("torch.")] * 3
    opened.verify_projection()


@st.composite
def shapes_and_sparsity(draw):
    shape = draw(
        st.sampled_from(
            [(1, 1), (5, 3), (256, 4), (257, 16), (300, 257), (65_536, 1), (65_537, 2), (70_000, 3), (40, 300)]
        )
    )
    return shape, draw(st.sampled_from([0, 0.5, 0.9, 0.99, 0.9999]))


@settings(max_examples=15, deadline=None)
@given(shapes_and_sparsity(), st.integers(0, 1000))
def test_any_mask_survives_a_round_trip(case, seed):
    """Covers every index dtype, K = 0 and K = all positions. safetensors' NumPy reader reads the file too."""
    (d_out, rank), sparsity = case
    tasks = ("a", "b") if sparsity else ("a",)
    drawn = random_values({"m": (d_out, 8)}, rank, tasks, sparsity, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = Checkpoint.create(folder, BASE, rank, {"m": (d_out, 8)}, seed)
        for task in tasks:
            made.add_task(task, drawn[task], alpha=1, sparsity=sparsity)
        opened = Checkpoint.open(folder)
        k = positions_per_matrix(sparsity, d_out, rank)
        taken = set()
        for task in tasks:
            assert same(opened.tasks[task], drawn[task])
            b = opened.tasks[task]["m"]
            assert len(b.values) == k == opened.manifest.task(task).k["m"]
            positions = set(b.positions.tolist())
            assert len(positions) == k
            assert not positions & taken
            taken |= positions
        assert opened.manifest.free_positions("m") == d_out * rank - len(taken)
        stored = safetensors.torch.load(small.task_file(folder, "a").read_bytes())
        assert set(stored) == {"m.rows", "m.cols", "m.values"}
        assert stored["m.rows"].dtype == index_dtype(d_out)
        assert stored["m.cols"].dtype == index_dtype(rank)
        raw = safetensors.numpy.load(safetensors.torch.save({k: v for k, v in stored.items() if k != "m.values"}))
        order = raw["m.rows"].astype(np.int64) * rank + raw["m.cols"]
        assert (np.diff(order) > 0).all()


def test_a_task_keeps_its_settings_and_templates(tmp_path):
    checkpoint = Checkpoint.create(tmp_path, BASE, RANK, SHAPES, seed=-3, init_std=0.02)
    task = checkpoint.add_task(
        "math",
        small.values()["math"],
        alpha=64,
        sparsity=SPARSITY,
        templates=Templates("{q}\n", "{a}"),
        training={"learning_rate": 1e-4, "betas": (0.9, 0.999), 3: "three"},
    )
    opened = Checkpoint.open(tmp_path)
    assert opened.manifest.task("math") == task == checkpoint.manifest.task("math")
    assert opened.manifest == checkpoint.manifest
    assert task.training == {"learning_rate": 1e-4, "betas": [0.9, 0.999], "3": "three"}
    assert task.templates == Templates("{q}\n", "{a}")
    assert task.alpha == 64.0
    assert (opened.manifest.projection.seed, opened.manifest.projection.init_std) == (-3, 0.02)
    assert opened.manifest.base_model == BASE
    assert task.file.bytes == small.task_file(tmp_path, "math").stat().st_size


def test_the_projection_follows_its_definition(tmp_path):
    checkpoint = Checkpoint.create(tmp_path, BASE, RANK, SHAPES, seed=7, init_std=0.5)
    for module, (_, d_in) in SHAPES.items():
        a = checkpoint.projection_of(module)
        assert a.numpy().tobytes() == projection.projection(7, module, RANK, d_in, 0.5).tobytes()
        assert a.dtype == torch.float32


def test_scores_change_only_the_manifest(tmp_path):
    small.make(tmp_path)
    before = small.snapshot(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    digest = checkpoint.manifest.adapter_digest
    scores = [{"set": "math", "evaluation": "gsm8k", "metric": "exact", "score": 0.25, "count": 4}]
    checkpoint.set_scores("math", scores)
    after = small.snapshot(tmp_path)
    assert {path for path in before if before[path] != after[path]} == {manifests.FILE_NAME}
    opened = Checkpoint.open(tmp_path)
    assert opened.manifest == checkpoint.manifest
    assert list(opened.manifest.task("math").scores) == scores
    assert opened.manifest.adapter_digest == digest


def test_adding_a_task_changes_no_byte_of_an_earlier_file(tmp_path):
    checkpoint = small.make(tmp_path, tasks=TASKS[:2])
    before = small.snapshot(tmp_path)
    checkpoint.add_task("code", small.values()["code"], alpha=1, sparsity=SPARSITY)
    after = small.snapshot(tmp_path)
    assert after.keys() - before.keys() == {"tasks/code.safetensors"}
    assert {path for path in before if before[path] != after[path]} == {manifests.FILE_NAME}


def test_only_the_documented_files_are_written(tmp_path):
    small.make(tmp_path / "a" / "b")
    files = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert files == ["a/b/loraf.json", *(f"a/b/tasks/{name}.safetensors" for name in sorted(TASKS))]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        small.make(tmp_path / "c")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "c").rglob("*") if f.is_file()}
    assert modes == {mode}


# --- subsets ----------------------------------------------------------------------------------------------------


def test_opening_a_subset_reads_only_its_files(tmp_path):
    small.make(tmp_path)
    small.task_file(tmp_path, "math").unlink()
    small.task_file(tmp_path, "code").write_bytes(b"damaged")
    opened = Checkpoint.open(tmp_path, ["nlu"])
    assert list(opened.tasks) == ["nlu"]
    assert opened.manifest.task_names == ("nlu",)
    assert same(opened.tasks["nlu"], small.values()["nlu"])
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.problems) == 2
    assert Checkpoint.open(tmp_path, []).tasks == {}


def test_a_subset_is_in_checkpoint_order_and_has_its_own_digest(tmp_path):
    whole = small.make(tmp_path)
    opened = Checkpoint.open(tmp_path, ["code", "math"])
    assert opened.manifest.task_names == ("math", "code")
    assert opened.manifest.adapter_digest != whole.manifest.adapter_digest
    assert opened.manifest.adapter_digest == Checkpoint.open(tmp_path, ("math", "code")).manifest.adapter_digest


def test_a_partly_opened_checkpoint_cannot_be_written(tmp_path):
    small.make(tmp_path, tasks=TASKS[:2])
    before = small.snapshot(tmp_path)
    for names in (["math"], []):
        opened = Checkpoint.open(tmp_path, names)
        with pytest.raises(CheckpointError, match="open it with all tasks"):
            opened.add_task("code", small.values()["code"], alpha=1, sparsity=SPARSITY)
    with pytest.raises(CheckpointError, match="open it with all tasks"):
        Checkpoint.open(tmp_path, ["math"]).set_scores("math", [])
    assert small.snapshot(tmp_path) == before
    Checkpoint.open(tmp_path, ["nlu", "math"]).set_scores("math", [])  # all tasks, by name


def test_all_unknown_tasks_are_named(tmp_path):
    small.make(tmp_path)
    with pytest.raises(UnknownTask) as caught:
        Checkpoint.open(tmp_path, ["math", "art", "science"])
    assert "'art'" in str(caught.value)
    assert "'science'" in str(caught.value)
    with pytest.raises(UnknownTask, match="choose from: math, nlu, code"):
        Checkpoint.open(tmp_path).set_scores("art", [])


# --- what must not go in ----------------------------------------------------------------------------------------


def matrix(positions, values, module=Q) -> SparseB:
    return SparseB.from_positions(torch.tensor(positions), values, (SHAPES[module][0], RANK))


def refused(tmp_path, pattern: str, values=None, name="code", tasks=TASKS[:2], **changes):
    """add_task raises, and changes neither the folder nor the object."""
    checkpoint = small.make(tmp_path, tasks=tasks)
    before, manifest, held = small.snapshot(tmp_path), checkpoint.manifest, dict(checkpoint.tasks)
    names = sorted(os.listdir(tmp_path / "tasks"))
    values = small.values()["code"] if values is None else values
    with pytest.raises(CheckpointError, match=pattern) as caught:
        checkpoint.add_task(name, values, **({"alpha": 1.0, "sparsity": SPARSITY} | changes))
    assert all(problem.file and problem.remedy for problem in caught.value.problems)
    assert small.snapshot(tmp_path) == before
    assert sorted(os.listdir(tmp_path / "tasks")) == names
    assert (checkpoint.manifest, checkpoint.tasks) == (manifest, held)
    good = small.values()["code"]
    checkpoint.add_task("code", good, alpha=1.0, sparsity=SPARSITY)  # the object can still be used
    assert same(Checkpoint.open(tmp_path).tasks["code"], good)
    return caught.value


@pytest.mark.parametrize(
    "name", ["math", "nlu", "all", "base", "../x", "a/b", "", ".", "..", "A", "a b", "x" * 65, "math.safetensors/../y"]
)
def test_a_duplicate_reserved_or_invalid_name_is_refused(tmp_path, name):
    refused(tmp_path, "already exists|is reserved|is not a valid task name", name=name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loraf.json", "tasks"]


def test_an_overlapping_mask_is_refused(tmp_path):
    drawn = small.values()
    error = refused(tmp_path, "holds .* positions of task 'nlu'", values=drawn["nlu"])
    assert {problem.field for problem in error.problems} == set(SHAPES)


def test_a_mask_that_overlaps_in_one_position_is_refused(tmp_path):
    drawn = small.values()
    b, other = drawn["code"][UP], drawn["math"][UP]
    positions = b.positions.clone()
    positions[0] = other.positions[0]
    drawn["code"][UP] = SparseB.from_positions(positions, b.values, b.shape)
    error = refused(tmp_path, "holds 1 positions of task 'math'", values=drawn["code"])
    assert [problem.field for problem in error.problems] == [UP]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_mask_of_the_wrong_size_is_refused(tmp_path, change):
    k = positions_per_matrix(SPARSITY, SHAPES[Q][0], RANK)
    free = sorted(
        set(range(SHAPES[Q][0] * RANK)) - set(torch.cat([small.values()[t][Q].positions for t in TASKS[:2]]).tolist())
    )
    positions = free[: k + change]
    values = small.values()["code"] | {Q: matrix(positions, torch.ones(len(positions), dtype=torch.bfloat16))}
    refused(tmp_path, f"{Q}: has {k + change} positions, but K is {k}", values=values)


def test_several_faults_are_named_at_once(tmp_path):
    values = small.values()["code"]
    values[Q].values[3] = float("nan")
    values[UP] = dataclasses.replace(values[UP], rows=values[UP].rows.flip(0))
    error = refused(tmp_path, "not finite", values=values)
    assert {problem.field for problem in error.problems} == {Q, UP}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(tmp_path, bad):
    values = small.values()["code"]
    values[UP].values[-1] = bad
    refused(tmp_path, f"{UP}: a value is not finite", values=values)


def test_missing_or_additional_modules_are_refused(tmp_path):
    values = small.values()["code"]
    refused(tmp_path / "a", f"modules differ.*{UP}", values={Q: values[Q]})
    refused(tmp_path / "b", "modules differ.*x.y", values=values | {"x.y": values[UP]})
    refused(tmp_path / "c", "the same dtype", values={})
    wide = dataclasses.replace(values[UP], shape=(SHAPES[UP][0], RANK + 1))
    refused(tmp_path / "d", "another shape", values=values | {UP: wide})


def test_mixed_or_unsupported_dtypes_are_refused(tmp_path):
    values = small.values()["code"]
    mixed = values | {UP: dataclasses.replace(values[UP], values=values[UP].values.float())}
    refused(tmp_path / "a", "the same dtype", values=mixed)
    double = {m: dataclasses.replace(b, values=b.values.double()) for m, b in values.items()}
    refused(tmp_path / "b", "one of bfloat16, float16, float32", values=double)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"sparsity": 1.0}, "sparsity: 1.0 is not in"),
        ({"sparsity": float("nan")}, "sparsity: nan is not in"),
        ({"sparsity": -0.1}, "sparsity: -0.1 is not in"),
        ({"sparsity": 0.7}, "positions, but K is"),
        ({"alpha": float("nan")}, "alpha: nan is out of range"),
        ({"alpha": float("inf")}, "alpha: inf is out of range"),
        ({"trained_with": ["art"]}, "trained_with: there is no task art"),
        ({"trained_with": ["math", "math"]}, "trained_with: names a task twice"),
        ({"training": {"loss": float("nan")}}, "cannot be written"),
        ({"training": {"path": Path("x")}}, "cannot be written"),
        ({"templates": Templates("\ud800", "")}, "cannot be written"),
        ({"templates": Templates(3, "")}, "templates.prompt: is 3, not a string"),
    ],
)
def test_settings_that_cannot_be_stored_are_refused(tmp_path, changes, pattern):
    refused(tmp_path, pattern, **changes)


def test_scores_that_cannot_be_stored_are_refused(tmp_path):
    checkpoint = small.make(tmp_path)
    before, manifest = small.snapshot(tmp_path), checkpoint.manifest
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.set_scores(
            "math", [{"set": "math", "evaluation": "eval", "metric": "exact", "score": float("nan"), "count": 1}]
        )
    assert small.snapshot(tmp_path) == before
    assert checkpoint.manifest == manifest


def test_changes_by_another_process_are_not_overwritten(tmp_path):
    one = small.make(tmp_path, tasks=TASKS[:1])
    other = Checkpoint.open(tmp_path)
    other.add_task("nlu", small.values()["nlu"], alpha=1, sparsity=SPARSITY)
    before = small.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="changed by another process"):
        one.add_task("code", small.values()["code"], alpha=1, sparsity=SPARSITY)
    with pytest.raises(CheckpointError, match="changed by another process"):
        one.set_scores("math", [])
    assert small.snapshot(tmp_path) == before


# --- creating one -----------------------------------------------------------------------------------------------


def test_create_never_overwrites_a_checkpoint(tmp_path):
    small.make(tmp_path)
    before = small.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        Checkpoint.create(tmp_path, BASE, RANK, SHAPES, seed=1)
    assert small.snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"modules": {}}, "modules"),
        ({"modules": {"m": (0, 4)}}, "modules.m"),
        ({"modules": {"m": (4, 2**31)}}, "modules.m"),
        ({"init_std": 0.0}, "projection.init_std"),
        ({"init_std": float("nan")}, "projection.init_std"),
        ({"init_std": float("inf")}, "projection.init_std"),
        ({"seed": 0.5}, "projection.seed"),
        ({"base_model": dataclasses.replace(BASE, name=None)}, "base_model.name"),
    ],
)
def test_a_checkpoint_that_could_not_be_read_back_is_not_created(tmp_path, changes, field):
    arguments = {"base_model": BASE, "rank": RANK, "modules": SHAPES, "seed": 0} | changes
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.create(tmp_path / "c", **arguments)
    assert field in [problem.field for problem in caught.value.problems]
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            Checkpoint.create(folder, BASE, RANK, SHAPES, seed=0)
        assert str(folder) in str(caught.value)
