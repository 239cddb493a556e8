"""Reading task files: once, without a second copy, and with every problem reported in order."""

from __future__ import annotations

import os

import pytest

from loraf import task_file
from loraf.checkpoint import Checkpoint
from loraf.errors import CorruptCheckpoint
from tests.loraf import small_checkpoints as small
from tests.loraf.small_checkpoints import TASKS


def test_tensors_share_the_memory_that_the_file_was_read_into(tmp_path):
    """There is no second copy, and no memory map of the file, whose content may change after it was verified."""
    small.make(tmp_path)
    opened = Checkpoint.open(tmp_path)
    before = {task: task_file.encode(matrices) for task, matrices in opened.tasks.items()}
    for task in TASKS:
        with open(small.task_file(tmp_path, task), "r+b") as stream:
            stream.write(b"\xff" * small.task_file(tmp_path, task).stat().st_size)
    assert {task: task_file.encode(matrices) for task, matrices in opened.tasks.items()} == before
    addresses = [b.values.data_ptr() for b in opened.tasks["math"].values()]
    assert max(addresses) - min(addresses) < opened.manifest.task("math").file.bytes


@pytest.mark.parametrize(("change", "says"), [(-1, "is not the file"), (1, "is not the file")])
def test_a_file_whose_length_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change, says):
    small.make(tmp_path)
    fstat = os.fstat
    changed = []

    def once(descriptor: int):
        status = fstat(descriptor)
        if not changed:
            changed.append(descriptor)
            os.truncate(f"/proc/self/fd/{descriptor}", status.st_size + change)
        return status

    monkeypatch.setattr(task_file.os, "fstat", once)
    with pytest.raises(CorruptCheckpoint, match=says) as caught:
        Checkpoint.open(tmp_path, ["nlu"])
    assert [problem.file for problem in caught.value.problems] == [str(small.task_file(tmp_path, "nlu"))]


def test_problems_are_reported_in_the_order_of_the_tasks(tmp_path):
    small.make(tmp_path)
    small.rewrite(tmp_path, "math", lambda tensors: tensors[f"{small.UP}.values"].fill_(float("nan")))
    small.task_file(tmp_path, "nlu").unlink()
    small.rewrite(tmp_path, "code", lambda tensors: tensors[f"{small.Q}.values"].fill_(float("inf")))
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(tmp_path)
    assert [problem.file for problem in caught.value.problems] == [str(small.task_file(tmp_path, t)) for t in TASKS]
