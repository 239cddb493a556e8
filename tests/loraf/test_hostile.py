"""A checkpoint's numbers are bounded before they are used, and memory follows the bytes of its files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError, CorruptCheckpoint
from loraf.files.bounded_file import open_regular, read_bounded
from loraf.matrices import sparse
from tests.loraf import small_checkpoints as small
from tests.loraf.small_manifests import DATA, PATH, a_manifest, a_task, changed, signed
from tests.source_tree import ROOT

SCORE = "tasks/0/scores/0"
TRAINING = "tasks/0/training"
IMPORTED = {"from": "peft", "source": "lora", "taken_over": True, "error": 0.0}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("rank", 4097, "rank"),
        ("rank", 65_536, "rank"),
        ("modules/model.layers.0.mlp.up_proj/d_in", 2**24 + 1, "modules.model.layers.0.mlp.up_proj"),
        ("base_model/name", "a\0b", "base_model.name"),
        ("base_model/name", "a" * 5000, "base_model.name"),
        ("base_model/shapes/hidden_size", 2**200, "base_model.shapes.hidden_size"),
        ("projection/seed", 2**200, "projection.seed"),
        ("tasks/0/file/bytes", -1, "tasks[0].file.bytes"),
        ("tasks/0/file/bytes", 2**62, "tasks[0].file.bytes"),
        ("tasks/1/trained_with", ["../x"], "tasks[1].trained_with"),
        ("tasks/0/templates/prompt", "x" * (2**20 + 1), "tasks[0].templates.prompt"),
        (SCORE, {}, "tasks[0].scores[0].metric"),
        (f"{SCORE}/score", "high", "tasks[0].scores[0].score"),
        (f"{SCORE}/score", None, "tasks[0].scores[0].score"),
        (f"{SCORE}/score", 10**400, "tasks[0].scores[0].score"),
        (f"{SCORE}/count", 1.5, "tasks[0].scores[0].count"),
        (f"{SCORE}/count", 2**60, "tasks[0].scores[0].count"),
        (f"{SCORE}/set", ["math"], "tasks[0].scores[0].set"),
        (f"{SCORE}/metric", "", "tasks[0].scores[0].metric"),
        (f"{SCORE}/metric", "\x1b[31mexact", "tasks[0].scores[0].metric"),
        (f"{SCORE}/set", "math\nnlu", "tasks[0].scores[0].set"),
        (f"{SCORE}/evaluation", "\x1b]0;title\x07", "tasks[0].scores[0].evaluation"),
        ("projection/generator", "\x1b[31m", "projection.generator"),
        (f"{TRAINING}/examples", "many", "tasks[0].training.examples"),
        (f"{TRAINING}/steps", None, "tasks[0].training.steps"),
        (f"{TRAINING}/steps", -1, "tasks[0].training.steps"),
        (f"{TRAINING}/settings", [], "tasks[0].training.settings"),
        (f"{TRAINING}/settings", None, "tasks[0].training.settings"),
        (f"{TRAINING}/imported", None, "tasks[0].training.imported"),
        (f"{TRAINING}/settings", {"training": 3}, "tasks[0].training.settings.training"),
        (f"{TRAINING}/settings", {"data": {"train": 3}}, "tasks[0].training.settings.data.train"),
        (
            f"{TRAINING}/settings",
            {"data": {"train": [{"dataset": 3}]}},
            "tasks[0].training.settings.data.train[0].dataset",
        ),
        (f"{TRAINING}/imported", {}, "tasks[0].training.imported.source"),
        (f"{TRAINING}/imported", IMPORTED | {"from": "x"}, "tasks[0].training.imported.from"),
        (f"{TRAINING}/imported", IMPORTED | {"error": "x"}, "tasks[0].training.imported.error"),
        (f"{TRAINING}/anything", 2**200, "tasks[0].training.anything"),
    ],
)
def test_what_readers_rely_on_is_checked(path, value, field):
    with pytest.raises(CorruptCheckpoint) as caught:
        manifests.parse(changed(path, value), PATH)
    assert field in {problem.field for problem in caught.value.problems}, str(caught.value)


@pytest.mark.parametrize("path", [f"{TRAINING}/own", f"{SCORE}/own", f"{TRAINING}/settings"])
def test_entries_of_a_later_release_are_kept(path):
    data = changed(path, {"training": {"new": 1}, "own": [1, "x"]})
    assert json.loads(manifests.parse(data, PATH).to_json()) == json.loads(data)


def test_a_module_s_name_can_be_shown():
    content = json.loads(DATA)
    for name in ("model.x\x1b[31m", "", "x" * 2000):
        renamed = json.loads(json.dumps(content).replace("model.layers.0.mlp.up_proj", json.dumps(name)[1:-1]))
        with pytest.raises(CorruptCheckpoint, match="cannot be shown"):
            manifests.parse(signed(renamed), PATH)


def test_lists_have_a_bound():
    task = a_task("math")
    many = tuple(dataclasses.replace(task, name=f"t{i}") for i in range(4097))
    problems: list[str] = []
    manifests.inconsistencies(a_manifest(tasks=many), lambda field, text: problems.append(field))
    assert "tasks" in problems


@pytest.mark.parametrize(
    "data", [b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70, b"[" + b"1," * (1 << 22) + b"1]"]
)
def test_json_that_is_deep_or_long_is_refused(data):
    with pytest.raises(CorruptCheckpoint, match="nested too deeply|more than"):
        manifests.parse(data, PATH)


def test_at_most_a_hundred_mistakes_are_listed():
    content = json.loads(DATA)
    content["tasks"][0]["scores"] = [{}] * 1000
    with pytest.raises(CorruptCheckpoint) as caught:
        manifests.parse(signed(content), PATH)
    assert len(caught.value.problems) == 101 and "more fields" in str(caught.value)


# --- files that are none ------------------------------------------------------------------------------------------


def test_pipes_devices_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="regular file|directory"):
            open_regular(path)
    (tmp_path / "large").write_bytes(bytes(100))
    with pytest.raises(OSError, match="100 bytes, and at most 99"):
        read_bounded(tmp_path / "large", 99)
    assert read_bounded(tmp_path / "large", 100) == bytes(100)


def test_a_checkpoint_of_pipes_is_refused_at_once(tmp_path):
    small.make(tmp_path)
    small.task_file(tmp_path, "math").unlink()
    os.mkfifo(small.task_file(tmp_path, "math"))
    with pytest.raises(CorruptCheckpoint, match=r"math.safetensors: cannot be read \(it is not a regular file\)"):
        Checkpoint.open(tmp_path)
    (tmp_path / manifests.FILE_NAME).unlink()
    os.mkfifo(tmp_path / manifests.FILE_NAME)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


# --- memory -------------------------------------------------------------------------------------------------------

HUGE = """
import resource, sys
from pathlib import Path
from loraf.checkpoint import Checkpoint
from loraf.manifest import BaseModel
import torch
from loraf.matrices.sparse import SparseB

folder = Path(sys.argv[1])
shapes = {f"model.layers.{i}.q_proj": (500_000, 8) for i in range(4)}
checkpoint = Checkpoint.create(folder, BaseModel("org/model", "X", "f"), 4096, shapes, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for task, first in (("math", 0), ("nlu", 2)):
    b = SparseB.from_positions(torch.tensor([first, first + 1]), torch.ones(2), (500_000, 4096))
    checkpoint.add_task(task, {name: b for name in shapes}, alpha=1.0, sparsity=1 - 1e-9)
Checkpoint.open(folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_small_checkpoint_of_a_huge_matrix_takes_little_memory(tmp_path):
    """A byte for each of its 2 · 10⁹ entries, for four modules at a time, would be gigabytes."""
    run = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path / "ckpt")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "ckpt").rglob("*") if file.is_file()) < 20_000
    assert int(run.stdout) < 100_000  # KiB


@pytest.mark.parametrize("dense", [True, False])
def test_shared_positions_are_found_in_sparse_matrices_too(tmp_path, monkeypatch, dense):
    monkeypatch.setattr(sparse, "_is_dense", lambda matrices: dense)
    checkpoint = small.make(tmp_path)
    b = [of_task[small.Q] for of_task in checkpoint.tasks.values()]
    assert sparse.examine(b) == ([None] * 3, False)
    assert sparse.examine([*b, b[1]]) == ([None] * 4, True)
    broken = dataclasses.replace(b[0], cols=b[0].cols.flip(0))
    assert sparse.examine([broken, b[1]])[0][0] is not None
