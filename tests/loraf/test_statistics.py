"""Statistics files and named sets of a checkpoint: stored, verified, removed, and without effect on what is served."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil

import pytest

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import CheckpointError, CorruptCheckpoint, UnknownTask
from loraf.files.folder_lock import locked
from tests.loraf import small_checkpoints as small
from tests.loraf.crash_steps import stopped_at
from tests.loraf.small_checkpoints import SPARSITY, TASKS

FIRST, SECOND = b"moments of math" * 10, b"moments of nlu, gathered again" * 7
SCORES = [{"set": "math", "evaluation": "eval", "metric": "exact", "score": 0.5, "count": 1}]


def file_of(folder, task: str):
    return folder / "statistics" / f"{task}.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Three tasks, two of them with statistics, and two named sets."""
    folder = tmp_path / "ckpt"
    checkpoint = small.make(folder)
    checkpoint.set_statistics("math", FIRST)
    checkpoint.set_statistics("nlu", SECOND)
    checkpoint.set_named_set("support", {"nlu": 0.5, "math": 1})
    checkpoint.set_named_set("code-only", {"code": 0.75})
    return folder


# --- statistics ---------------------------------------------------------------------------------------------------


def test_a_task_may_be_added_with_its_statistics(tmp_path):
    checkpoint = Checkpoint.create(tmp_path, small.BASE, small.RANK, small.SHAPES, seed=0)
    values = small.values()
    task = checkpoint.add_task("math", values["math"], alpha=16.0, sparsity=SPARSITY, statistics=FIRST)
    assert file_of(tmp_path, "math").read_bytes() == FIRST
    assert task.statistics == manifests.StoredFile(
        "statistics/math.safetensors", len(FIRST), hashlib.sha256(FIRST).hexdigest()
    )
    checkpoint.add_task("nlu", values["nlu"], alpha=16.0, sparsity=SPARSITY)
    checkpoint.set_scores("math", SCORES)
    opened = Checkpoint.open(tmp_path)
    assert opened.manifest.task("math").statistics == task.statistics
    assert (opened.statistics_bytes("math"), opened.statistics_bytes("nlu")) == (FIRST, None)
    assert Checkpoint.open(tmp_path, ["math"]).statistics_bytes("math") == FIRST


def test_statistics_and_sets_change_nothing_that_is_computed_and_leave_no_trace(tmp_path):
    checkpoint = small.make(tmp_path)
    before, digest = small.snapshot(tmp_path), checkpoint.manifest.adapter_digest
    checkpoint.set_statistics("nlu", FIRST)
    checkpoint.set_named_set("support", {"math": 1.0})
    assert checkpoint.manifest.adapter_digest == digest
    now = small.snapshot(tmp_path)
    assert {path for path in now if now[path] != before.get(path)} == {
        manifests.FILE_NAME,
        "statistics/nlu.safetensors",
    }
    checkpoint.set_statistics("nlu", None)
    assert not file_of(tmp_path, "nlu").exists() and checkpoint.manifest.task("nlu").statistics is None
    checkpoint.set_named_set("support", {"nlu": 1.0})
    assert Checkpoint.open(tmp_path).manifest.sets == {"support": {"nlu": 1.0}}
    Checkpoint.remove_task(tmp_path, "code")
    left = Checkpoint.remove_task(tmp_path, "nlu")
    assert left.sets == {} and left.format_version == 1


@pytest.mark.parametrize("damage", ["missing", "changed", "shorter", "longer", "a folder", "a pipe"])
def test_serving_ignores_damaged_statistics_and_reading_them_names_the_file(folder, damage):
    file = file_of(folder, "math")
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage == "a pipe":
        os.mkfifo(file)
    elif damage != "missing":
        file.write_bytes({"changed": b"M" + FIRST[1:], "shorter": FIRST[:-1], "longer": FIRST + b"x"}[damage])
    checkpoint = Checkpoint.open(folder)
    with CheckpointStream.open(folder) as stream:
        stream.finish()
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoint.statistics_bytes("math")
    (problem,) = caught.value.problems
    assert problem.file == str(file) and problem.remedy and "protect" in problem.remedy
    assert checkpoint.statistics_bytes("nlu") == SECOND
    file_of(folder, "nlu").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoint.verify_statistics()
    assert [p.file for p in caught.value.problems] == [str(file), str(file_of(folder, "nlu"))]


def test_what_cannot_be_stored_is_refused_and_nothing_is_written(folder, monkeypatch):
    before = small.snapshot(folder)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(UnknownTask):
        checkpoint.set_statistics("art", FIRST)
    with pytest.raises(UnknownTask):
        checkpoint.statistics_bytes("art")
    monkeypatch.setattr(manifests, "statistics_bytes", lambda *_: len(SECOND) + 1)
    with pytest.raises(CheckpointError, match=r"tasks\[0\].statistics.bytes: 212 is not a size up to 211"):
        checkpoint.set_statistics("math", bytes(212))
    for part in (Checkpoint.open(folder, ["math"]), Checkpoint.open(folder, [])):
        with pytest.raises(CheckpointError, match="only some of its tasks were read"):
            part.set_named_set("x", {"math": 1.0})
    with pytest.raises(CheckpointError, match="only some of its tasks were read"):
        Checkpoint.open(folder, ["math"]).set_statistics("math", None)
    assert small.snapshot(folder) == before


def test_replaced_statistics_are_old_new_or_none_wherever_it_stops(folder, tmp_path):
    """The manifest must never name a file with other content."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with stopped_at(0, lambda: None) as steps:
        Checkpoint.open(shutil.copytree(folder, tmp_path / "counted")).set_statistics("math", SECOND)
    seen = set()
    for at in range(1, len(steps.names) + 1):
        copy = shutil.copytree(folder, tmp_path / str(at))
        checkpoint = Checkpoint.open(copy)
        with stopped_at(at, full), pytest.raises(CheckpointError, match="No space left"):
            checkpoint.set_statistics("math", SECOND)
        opened = Checkpoint.open(copy)
        seen.add(opened.statistics_bytes("math"))
        opened.set_statistics("math", SECOND)  # repeated
        assert Checkpoint.open(copy).statistics_bytes("math") == SECOND
    assert seen == {FIRST, None, SECOND}


def test_an_added_task_with_statistics_is_there_as_a_whole_or_not_at_all(tmp_path):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add(checkpoint: Checkpoint) -> None:
        checkpoint.add_task("nlu", small.values()["nlu"], alpha=1.0, sparsity=SPARSITY, statistics=SECOND)

    small.make(tmp_path / "before", tasks=("math",))
    with stopped_at(0, lambda: None) as steps:
        add(Checkpoint.open(shutil.copytree(tmp_path / "before", tmp_path / "counted")))
    for at in range(1, len(steps.names) + 1):
        copy = shutil.copytree(tmp_path / "before", tmp_path / str(at))
        with stopped_at(at, full), pytest.raises(CheckpointError, match="No space left"):
            add(Checkpoint.open(copy))
        opened = Checkpoint.open(copy)
        if "nlu" not in opened.manifest.task_names:
            add(opened)
        assert Checkpoint.open(copy).statistics_bytes("nlu") == SECOND


# --- removal ------------------------------------------------------------------------------------------------------


def test_a_removed_task_takes_its_statistics_and_its_sets_with_it(folder):
    left = Checkpoint.remove_task(folder, "nlu")
    assert left.sets == {"code-only": {"code": 0.75}}
    assert not file_of(folder, "nlu").exists()
    opened = Checkpoint.open(folder)
    assert opened.manifest == left and opened.statistics_bytes("math") == FIRST


@pytest.mark.parametrize("left_behind", ["tasks", "statistics"])
def test_what_an_interrupted_removal_left_behind_can_be_removed(folder, left_behind):
    contents = {path: path.read_bytes() for path in (file_of(folder, "nlu"), small.task_file(folder, "nlu"))}
    Checkpoint.remove_task(folder, "nlu")
    for path, data in contents.items():
        if path.parent.name == left_behind:
            path.write_bytes(data)
    Checkpoint.remove_task(folder, "nlu")
    assert not any(path.exists() for path in contents)
    with pytest.raises(UnknownTask):
        Checkpoint.remove_task(folder, "nlu")


# --- named sets ---------------------------------------------------------------------------------------------------


def test_named_sets_are_stored_in_the_order_of_the_tasks_and_replaced(folder):
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.manifest.sets["support"].items()) == [("math", 1.0), ("nlu", 0.5)]
    assert str(checkpoint.manifest.named_set("support")) == "math+nlu:0.5"
    checkpoint.set_named_set("support", {"math": 0, "code": -2})
    assert list(checkpoint.manifest.sets) == ["support", "code-only"]
    assert str(Checkpoint.open(folder).manifest.named_set("support")) == "code:-2.0"


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("math", {"nlu": 1.0}, "'math' is the name of a task"),
        ("all", {"nlu": 1.0}, "'all' is reserved"),
        ("a b", {"nlu": 1.0}, "is not a valid set name"),
        ("x", {}, "sets.x: names no task"),
        ("x", {"art": 1.0}, "there is no task 'art'"),
        ("x", {"nlu": float("nan")}, "sets.x.nlu: nan is not a weight from -16 to 16"),
        ("x", {"nlu": float("inf"), "math": 17}, "sets.x.math: 17.0 is not a weight"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(folder, name, weights, says):
    before = small.snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).set_named_set(name, weights)
    assert says in str(caught.value)
    assert small.snapshot(folder) == before


def test_a_new_task_may_not_have_the_name_of_a_set(tmp_path):
    checkpoint = small.make(tmp_path, tasks=("math",))
    checkpoint.set_named_set("nlu", {"math": 0.5})
    with pytest.raises(CheckpointError, match="'nlu' is the name of a named set"):
        checkpoint.add_task("nlu", small.values()["nlu"], alpha=1.0, sparsity=SPARSITY)


def test_only_one_process_writes(folder):
    """What another process wrote since is not overwritten."""
    one, other = Checkpoint.open(folder), Checkpoint.open(folder)
    with locked(folder, "test"):
        one.set_named_set("x", {"math": 1.0})
    for write in (
        lambda: other.set_named_set("y", {"math": 1.0}),
        lambda: other.set_statistics("code", FIRST),
    ):
        with pytest.raises(CheckpointError, match="was changed by another process"):
            write()
    assert not file_of(folder, "code").exists()
    assert other.manifest.task_names == TASKS
