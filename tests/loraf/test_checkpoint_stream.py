"""Streaming a checkpoint gives the same data as opening it, or the same error.

tests/loraf/test_checkpoint_damage.py reads every damaged checkpoint in both ways.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import checkpoint_stream, task_file
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import CheckpointError, CorruptCheckpoint, UnknownTask
from loraf.files import strict_safetensors
from loraf.manifest import BaseModel
from loraf.system import pages
from tests.loraf import small_checkpoints as small
from tests.loraf.small_checkpoints import TASKS, UP, Q
from tests.standins import random_values

LAYERS = 6
SHAPES = {f"layers.{i}.{name}": (rows, 24) for i in range(LAYERS) for name, rows in [("q", 300), ("k", 33), ("up", 70)]}
RANK, SPARSITY = 8, 0.8  # K: 480, 52, 112


def make(folder, shapes=SHAPES, rank=RANK, dtype=torch.bfloat16, sparsity=SPARSITY) -> Checkpoint:
    base = BaseModel("org/model", "LlamaForCausalLM", "f" * 64, None, {"hidden_size": 24})
    checkpoint = Checkpoint.create(folder, base, rank, shapes, seed=0)
    for task, values in random_values(shapes, rank, TASKS, sparsity, 0, dtype=dtype).items():
        checkpoint.add_task(task, values, alpha=16.0, sparsity=sparsity)
    return checkpoint


def bits(b) -> tuple:
    return b.shape, *((t.dtype, t.clone().view(torch.uint8).tolist()) for t in (b.rows, b.cols, b.values))


def in_groups(folder, groups, tasks=None) -> dict:
    """Streams a checkpoint. Returns task → module → all of its numbers."""
    tasks_read: dict = {}
    with CheckpointStream.open(folder, tasks) as checkpoint:
        for group in groups:
            with checkpoint.read_modules(group) as matrices:
                for task, modules in matrices.items():
                    tasks_read.setdefault(task, {}).update({module: bits(b) for module, b in modules.items()})
        checkpoint.finish()
    return tasks_read


def whole(folder, tasks=None) -> dict:
    return {
        task: {module: bits(b) for module, b in modules.items()}
        for task, modules in Checkpoint.open(folder, tasks).tasks.items()
    }


@st.composite
def groups_of(draw, names):
    names = draw(st.permutations(names))
    cuts = sorted(draw(st.lists(st.integers(0, len(names)), max_size=5)))
    bounds = [0, *cuts, len(names)]
    return [names[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


@settings(max_examples=40, deadline=None)
@given(
    groups_of(list(SHAPES)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from(["ours", "by dtype", "odd offsets"]),
)
@pytest.mark.slow
def test_modules_and_tensors_are_read_in_any_order(tmp_path_factory, groups, dtype, layout):
    folder = tmp_path_factory.mktemp("ckpt")
    make(folder, dtype=dtype)
    for task in TASKS if layout != "ours" else ():
        data = small.task_file(folder, task).read_bytes()
        if layout == "by dtype":
            data = safetensors.torch.save(safetensors.torch.load(data))
        else:  # numbers at odd offsets, which safetensors allows
            length = int.from_bytes(data[:8], "little")
            header = data[8 : 8 + length].rstrip()
            header += b" " * (1 + len(header) % 2)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        small.rewrite_bytes(folder, task, data)
    assert in_groups(folder, groups) == whole(folder)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_safetensors_reads_an_encoded_task_file(tmp_path_factory, data, dtype):
    """Each tensor is aligned to its item size, so that readers can map it. Both of safetensors' readers agree."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 5)), min_size=1, max_size=8))
    matrices = {
        f"m{i}": random_values({"m": (d_out, 1)}, rank, ["t"], 0.5, i, dtype=dtype)["t"]["m"]
        for i, (d_out, rank) in enumerate(sizes)
    }
    file = tmp_path_factory.mktemp("file") / "task.safetensors"
    written = task_file.encode(matrices)
    file.write_bytes(written)
    expected = {f"{m}.{part}": getattr(b, part) for m, b in matrices.items() for part in task_file.PARTS}

    def same(tensors) -> bool:
        return tensors.keys() == expected.keys() and all(
            torch.equal(tensors[name], expected[name]) for name in expected
        )

    assert same(safetensors.torch.load(written))
    with safetensors.safe_open(file, "pt") as opened:
        assert same({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - safe_open is not a mapping
    entries = strict_safetensors.parse_header(
        written[8 : strict_safetensors.header_end(written[:8], len(written))], sum_bytes(expected)
    )
    assert all(entry.first % entry.dtype.itemsize == 0 for entry in entries)


def sum_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_task_file_is_in_the_order_of_the_modules(tmp_path, dtype):
    """So little is read ahead: at most three modules, although some tensors have an odd number of bytes."""
    shapes = {f"m{i}": (77, 24) for i in range(40)}
    checkpoint = make(tmp_path, shapes, rank=5, dtype=dtype, sparsity=0.8)
    assert {k % 4 for k in checkpoint.manifest.task("math").k.values()} == {1}
    data = small.task_file(tmp_path, "math").read_bytes()
    end = strict_safetensors.header_end(data[:8], len(data))
    furthest = -1
    for entry in strict_safetensors.parse_header(data[8:end], len(data) - end):
        module = int(entry.name.removeprefix("m").partition(".")[0])
        assert module >= furthest - 3
        furthest = max(furthest, module)


def test_memory_is_reused(tmp_path, monkeypatch):
    make(tmp_path)
    taken = []

    def counted(size: int) -> torch.Tensor:
        taken.append(size)
        return pages(size)

    monkeypatch.setattr(checkpoint_stream, "pages", counted)
    in_groups(tmp_path, [[module] for module in SHAPES])
    files = sum(file.stat().st_size for file in (tmp_path / "tasks").iterdir())
    largest = sum(480 * 5 + 3 * 128 for _ in TASKS)
    assert 0 < sum(taken) <= largest < files / 3


def test_the_buffer_suffices_for_the_worst_alignment(tmp_path):
    """Each tensor begins on the last byte of a cache line and ends on the first byte of another."""
    shapes = {"apart": (132, 24), "before": (126, 24), "between": (124, 24)}
    checkpoint = make(tmp_path, shapes, rank=2, sparsity=0.75)
    assert checkpoint.manifest.task("math").k == {"apart": 66, "before": 63, "between": 62}
    first = ["before.rows", "apart.rows", "between.rows", "apart.cols", "between.cols", "apart.values"]
    for task in TASKS:
        tensors = safetensors.torch.load(small.task_file(tmp_path, task).read_bytes())
        entries, body = {}, b""
        for name in [*first, *sorted(tensors.keys() - set(first))]:
            raw = bytes(strict_safetensors.bytes_of(tensors[name].contiguous()))
            dtype = {torch.uint8: "U8", torch.bfloat16: "BF16"}[tensors[name].dtype]
            span = [len(body), len(body) + len(raw)]
            entries[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": span}
            body += raw
        assert {entries[name]["data_offsets"][0] % 64 for name in first[1::2]} == {63}
        header = json.dumps(entries).encode()
        small.rewrite_bytes(tmp_path, task, len(header).to_bytes(8, "little") + header + body)
    assert in_groups(tmp_path, [["apart"], ["before", "between"]]) == whole(tmp_path)


def test_several_threads_read_at_once(tmp_path):
    make(tmp_path)
    expected = whole(tmp_path)
    gate = threading.Barrier(4)
    with CheckpointStream.open(tmp_path) as checkpoint, ThreadPoolExecutor(4) as pool:

        def read(i: int) -> bool:
            gate.wait(10)
            mine = list(SHAPES)[i::4]
            right = True
            for module in mine:
                with checkpoint.read_modules([module]) as matrices:
                    right &= all(bits(matrices[task][module]) == expected[task][module] for task in TASKS)
            return right

        assert all(pool.map(read, range(4)))
        checkpoint.finish()


def test_a_subset_of_tasks_is_read_and_unknown_tasks_are_refused(tmp_path):
    small.make(tmp_path)
    small.task_file(tmp_path, "nlu").unlink()
    assert in_groups(tmp_path, [[Q, UP]], ["code", "math"]) == whole(tmp_path, ["code", "math"])
    with pytest.raises(UnknownTask), CheckpointStream.open(tmp_path, ["history"]):
        pass
    with pytest.raises(CheckpointError), CheckpointStream.open(tmp_path / "nothing"):
        pass


def test_finish_verifies_modules_that_were_not_read(tmp_path):
    small.make(tmp_path)
    small.rewrite(tmp_path, "nlu", lambda tensors: tensors[f"{UP}.values"].fill_(float("nan")))
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        in_groups(tmp_path, [[Q]])


def test_changes_to_bytes_already_read_do_not_matter(tmp_path):
    """Each byte is read once, so the data that was read matches the stated digest."""
    small.make(tmp_path)
    expected = whole(tmp_path)
    with CheckpointStream.open(tmp_path) as checkpoint, checkpoint.read_modules([Q, UP]) as matrices:
        for task in TASKS:
            small.task_file(tmp_path, task).write_bytes(b"x")
        checkpoint.finish()
        assert {task: {m: bits(b) for m, b in modules.items()} for task, modules in matrices.items()} == expected


@pytest.mark.parametrize("repaired", [False, True])
def test_changes_to_bytes_not_yet_read_are_detected(tmp_path, repaired):
    small.make(tmp_path)
    file = small.task_file(tmp_path, "math")
    good = file.read_bytes()
    with CheckpointStream.open(tmp_path) as checkpoint:
        with checkpoint.read_modules([Q]):
            pass
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # a value's last bits: the mask stays valid
        with checkpoint.read_modules([UP]):
            pass
        if repaired:
            file.write_bytes(good)
        says = "was changed while it was read" if repaired else "its SHA-256 differs"
        with pytest.raises(CorruptCheckpoint, match=says):
            checkpoint.finish()
