"""Saves killed at random moments; the thousand are in benchmarks/results/killed-saves.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from loraf.checkpoint import Checkpoint
from tests.loraf import small_checkpoints as small
from tests.source_tree import ROOT

RESULT = ROOT / "benchmarks" / "results" / "killed-saves.json"


@pytest.fixture(scope="module")
def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint_and_the_next_leaves_nothing_else(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/killed_saves.py", "--kills", "18", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["kills"] == 18 and result["findings"] == []


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: Checkpoint.open(folder).set_named_set("careful", {"math": 0.5}),
        lambda folder: Checkpoint.open(folder).set_statistics("math", b"x"),
        lambda folder: Checkpoint.remove_task(folder, "nlu"),
    ],
)
def test_the_next_save_removes_what_a_killed_one_left_behind(tmp_path, dead_process, save):
    small.make(tmp_path, tasks=("math", "nlu"))
    (tmp_path / "statistics").mkdir()
    left = [f".loraf.json.{dead_process}.tmp", f"tasks/.code.safetensors.{dead_process}.tmp"]
    left += [f"statistics/.math.safetensors.{dead_process}.tmp"]
    of_others = [f".loraf.json.{os.getppid()}.tmp", ".mine.tmp", f".notes.txt.{dead_process}.tmp"]
    for name in left + of_others:
        (tmp_path / name).write_bytes(b"half")
    save(tmp_path)
    assert [name for name in left if (tmp_path / name).exists()] == []
    assert [name for name in of_others if not (tmp_path / name).exists()] == []


def test_a_thousand_kills_have_been_survived():
    result = json.loads(RESULT.read_text())
    assert result["kills"] >= 1000 and result["faults"] == 0
    for name, of_kind in result["saves"].items():
        assert of_kind["left"].get("neither", 0) == 0 and of_kind["kills"] >= 100, name
    left = [state for of_kind in result["saves"].values() for state in of_kind["left"]]
    assert {"old", "new"} <= set(left)
    assert any("temporary file" in of_kind["also left"] for of_kind in result["saves"].values())  # killed in a write
