"""Changed checkpoints through the server's loader; the long run is in benchmarks/results/mutated-checkpoints.json."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from loraf import delta, system, task_file
from loraf.errors import CorruptCheckpoint, Problem
from tests.loraf import hostile_changes, mutants, slow_checkpoint
from tests.loraf_serve.adapters import judged_loads
from tests.loraf_serve.adapters.judged_loads import World
from tests.source_tree import ROOT

RESULT = ROOT / "benchmarks" / "results" / "mutated-checkpoints.json"
CASES = 1000
CHECKS = {  # what the mutants must reach, or they test little
    "does not match the manifest's content",
    "is not a safetensors file …",
    "coordinates are not unique and sorted by row, then column",
    "task … holds N positions of task …",
    "a row lies outside the matrix",
    "a column lies outside the matrix",
    "a value is not finite",
    "holds other tensors than the manifest lists …",
    "A rebuilt from the seed is not the A that the tasks were trained with",
    "leads out of --adapter-root",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than such small loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "processors", lambda: 1)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("mutants") / "world")


def inputs(count: int, seed: str):
    return [random.Random(f"{seed} {number}").randbytes(160) for number in range(count)]


def test_every_mutant_is_refused_by_name_or_loaded_as_the_slow_reader_does(world):
    verdicts = [world.judge(data) for data in inputs(CASES, "test")]
    faults = [(verdict.fault, made.kinds) for made, verdict in verdicts if verdict.fault]
    assert faults == []
    assert {check for _, verdict in verdicts for check in verdict.checks} >= CHECKS
    loaded = sum(verdict.outcome == "loaded" for _, verdict in verdicts)
    assert 0.05 * CASES < loaded < 0.4 * CASES


def test_the_same_bytes_make_the_same_mutant(world):
    for data in inputs(200, "again"):
        one, other = (mutants.mutant(data, world.bases) for _ in range(2))
        assert (one.text, one.entries, one.kinds) == (other.text, other.entries, other.kinds)


@pytest.mark.parametrize(
    ("place", "name", "changed", "fault"),
    [
        (task_file, "verify", lambda *arguments: [], "the slow reader refuses it"),
        (judged_loads, "delta_weight", lambda *a, **k: delta.delta_weight(*a, **k) * 1.001, "ΔW of"),
        (judged_loads, "SECONDS", -1.0, "took"),
        (judged_loads, "_is_streamed", lambda *arguments, **keywords: False, "the streaming reader refuses it"),
    ],
)
def test_a_wrong_loader_would_be_noticed(tmp_path, monkeypatch, place, name, changed, fault):
    world = World(tmp_path / "world")
    monkeypatch.setattr(place, name, changed)
    faults = [verdict.fault for _, verdict in map(world.judge, inputs(150, "test")) if verdict.fault]
    assert any(found.startswith(fault) for found in faults), faults


def test_errors_that_show_too_much_or_too_little_would_be_noticed(world):
    made = mutants.mutant(b"", world.bases)
    problem = Problem("is damaged", file="plain/loraf.json")
    assert world._wrong_error(CorruptCheckpoint(problem), made) is None
    for message, file, fault in (
        ("is damaged", "", "names no file"),
        (f"{world.folder}/x is damaged", "plain/loraf.json", "names a folder of this machine"),
        ("\x1b[31m is damaged", "plain/loraf.json", "holds characters that steer a terminal"),
        ("x" * 5000, "plain/loraf.json", "has 5,"),
    ):
        assert world._wrong_error(CorruptCheckpoint(Problem(message, file=file)), made).startswith(fault)


@pytest.mark.parametrize(
    "name", ["\x1b[31m", "x\ny", "a" * 5000, "\u2028"], ids=["escape", "line", "long", "separator"]
)
def test_names_in_files_neither_steer_a_terminal_nor_fill_it(world, name):
    """As a field of the manifest, as a tensor, and as the name of a task."""
    base = world.bases[0]
    for change in ("field", "tensor", "task", "twice"):
        made = mutants.Mutant(base, json.loads(base.manifest), dict(base.files))
        if change == "field":
            made.content["projection"][name] = 1
        elif change == "task":
            made.content["tasks"][0]["name"] = name
        else:
            tensors = mutants.tensors_of(base.files["tasks/math.safetensors"])
            tensors[0].name = name
            if change == "twice":
                tensors[0].dtype = "X" * 5000
            made.put("tasks/math.safetensors", mutants.encoded(tensors))
        made.text = mutants._seal_all(made)
        world._write(made)
        verdict = world._judge(made, (), world._roots[0], all_readers=True)
        assert (verdict.outcome, verdict.fault) == ("CorruptCheckpoint", None), change


def test_the_slow_reader_reads_what_loraf_has_written(world):
    from loraf.checkpoint import Checkpoint

    world._write(mutants.Mutant(world.bases[1], {}, dict(world.bases[1].files), text=world.bases[1].manifest))
    folder = world.bases[1].folder
    opened, slow = Checkpoint.open(folder), slow_checkpoint.read(folder)
    for task, modules in opened.tasks.items():
        for module, b in modules.items():
            dense = torch.zeros(b.shape)
            for (row, column), value in slow.b[task][module].items():
                dense[row, column] = value
            assert torch.equal(b.dense(), dense)


def test_choices_from_bytes_end_in_the_first():
    chance = hostile_changes.Choices(b"\5\1")
    assert [chance.number(4), chance.choice("ab"), chance.choice("ab"), chance.randint(3, 9)] == [1, "b", "a", 3]


@pytest.mark.slow
def test_the_campaign_runs_by_command(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/mutated_checkpoints.py", "--cases", "600", "--guided", "0.5"]
    run = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["faults"] == 0 and result["cases"] == 600
    assert ("guided" in result) == (find_spec("atheris") is not None)


def test_the_long_run_has_found_nothing_that_is_left():
    result = json.loads(RESULT.read_text())
    assert result["faults"] == 0 and result["cases"] >= 1_000_000
    assert set(result["random"]["checks"]) >= CHECKS
