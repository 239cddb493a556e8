"""`loraf-train tune-weights`: the search against all weights, the halves, what is stored, and refusals."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import re
import types

import pytest

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.tasksets import TaskSet
from loraf_train.commands import tune_weights as module
from loraf_train.commands.tune_weights import GRID, search, split
from loraf_train.scoring import evaluate
from loraf_train.scoring.evaluate import completion_loss
from loraf_train.sequence import runner
from loraf_train.sequence.preflight import prepare
from tests.loraf_train.command_line import TASKS, digests, run, words

TUNE = ("tune-weights", "ckpt", "tasks.yaml")

# --- the search -------------------------------------------------------------------------------------------------------


def test_the_best_weights_of_a_separable_objective_are_found():
    """The largest over the whole grid, found one by one: 27 or fewer of 343."""
    target = (0.25, 1.5, 0.0)
    asked = []

    def objective(weights):
        asked.append(weights)
        return -sum((w - t) ** 2 for w, t in zip(weights, target, strict=True))

    found = search(3, objective)
    assert found == target == max(itertools.product(GRID, repeat=3), key=objective)
    assert len(set(asked[: -(len(GRID) ** 3)])) == len(asked) - len(GRID) ** 3 < 50  # nothing is scored twice


def test_a_weight_is_chosen_again_once_another_has_changed():
    """The first pays only once the second is 0, and the other way round from 1, 1 only the second pays alone."""
    values = {(1.0, 0.0): 0.2, (0.5, 0.0): 0.4, (0.5, 1.5): 0.9}
    assert search(2, lambda weights: values.get(weights, 0.1)) == (0.5, 1.5)


@pytest.mark.parametrize(
    ("equally_good", "chosen"),
    [
        (GRID, 1.0),
        ((0.0, 0.5, 0.75, 1.5), 0.75),
        ((0.75, 1.25), 1.25),
        ((0.0, 0.25), 0.25),
    ],
)
def test_of_equally_good_weights_the_one_nearer_to_1_is_chosen_then_the_larger(equally_good, chosen):
    assert search(1, lambda weights: float(weights[0] in equally_good)) == (chosen,)


def test_an_objective_that_is_no_number_is_worse_than_any_other():
    assert search(2, lambda weights: math.nan if weights[0] == 1.0 else -weights[1]) == (1.25, 0.0)


def test_every_set_is_split_in_two_halves_that_share_nothing(copied):
    prepared = prepare("tasks.yaml")
    data = prepared.data["upper"]
    first, second = split(data, 0)
    whole = data.evaluation["upper"].examples
    parts = [half.evaluation["upper"].examples for half in (first, second)]
    assert [len(part) for part in parts] == [4, 3]
    assert sorted(map(id, itertools.chain(*parts))) == sorted(map(id, whole))
    assert split(data, 0)[0] == first and any(split(data, seed)[0] != first for seed in range(1, 6))
    truth = split(prepared.data["truth"], 0)  # two evaluation sets over the same records
    prompts = [{tuple(e.prompt_ids) for part in half.evaluation.values() for e in part.examples} for half in truth]
    assert not prompts[0] & prompts[1]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_chosen_weights_are_stored_and_can_be_named(copied, capsys, monkeypatch):
    monkeypatch.setattr(module, "GRID", (0.5, 1.0))
    before, digest = digests(copied / "ckpt"), manifests.read(copied / "ckpt").adapter_digest
    status, out, err = run(capsys, *TUNE, "--tasks", "truth,upper", "--name", "support")
    assert status == 0, err
    assert "one half chooses the weights, the other is held out and scored" in out
    after = digests(copied / "ckpt")
    assert {name for name in after if after[name] != before[name]} == {"loraf.json"}
    manifest = manifests.read(copied / "ckpt")
    assert manifest.adapter_digest == digest and list(manifest.sets) == ["support"]
    weights = manifest.sets["support"]
    assert list(weights) == ["upper", "truth"] and set(weights.values()) <= {0.5, 1.0}
    rows = {w[0]: w for w in map(words, out.splitlines()) if w}
    assert rows["upper"][1:3] == ["exact_match", f"{weights['upper']:g}"] and rows["upper"][-3:] == ["4", "+", "3"]
    assert rows["truth"][1:3] == ["choice", f"{weights['truth']:g}"] and rows["truth"][-3:] == ["6", "+", "4"]
    text = str(manifest.named_set("support"))
    assert out.splitlines()[-1].endswith(f"named set support = {text}")

    # Together, the halves of a task are all its records, as `eval` scores them under the set's name.
    status, _, err = run(capsys, "eval", "tasks.yaml", "--tasks", "support", "--json", "s.json")
    assert status == 0, err
    scored = {(s["task"], s["evaluation"]): s for s in json.loads((copied / "s.json").read_text())["scores"]}
    assert {s["set"] for s in scored.values()} == {text}
    chosen, held_out = float(rows["upper"][4]), float(rows["upper"][6])
    assert (4 * chosen + 3 * held_out) / 7 == pytest.approx(scored["upper", "upper"]["score"], abs=1e-3)

    # It stands for the set in `export` too, and a name that is neither a task nor a set is refused.
    for name in ("support", text):
        arguments = ("--tasks", name, "--format", "peft", "--out", f"peft-{len(name)}")
        assert run(capsys, "export", "ckpt", *arguments)[0] == 0
    one, other = (digests(folder)["adapter_model.safetensors"] for folder in sorted(copied.glob("peft-*")))
    assert one == other
    status, _, err = run(capsys, "eval", "tasks.yaml", "--tasks", "suport")
    assert status == 2 and "no task or named set 'suport' → choose from: upper, truth, support" in err


def test_the_weight_with_the_lowest_loss_on_the_choosing_half_is_stored(copied, capsys, monkeypatch):
    """The losses are measured here once more, weight by weight."""
    monkeypatch.setattr(module, "GRID", (-8.0, 0.75, 8.0))
    overrides = ["tasks.upper.metric=loss", "seed=0"]
    prepared = prepare("tasks.yaml", overrides)
    model, _, _ = runner.load_model(prepared.config)
    merger = Merger(model, Checkpoint.open("ckpt"))
    halves = [half.evaluation["upper"].examples for half in split(prepared.data["upper"], 0)]
    losses = {}
    for weight in (-8.0, 0.75, 1.0, 8.0):
        merger.merge(TaskSet((("upper", weight),)))
        losses[weight] = [completion_loss(model, half) for half in halves]
    best = min(losses, key=lambda weight: losses[weight][0])
    assert losses[8.0][0] > 2 * losses[best][0] and losses[-8.0][0] > 2 * losses[best][0]

    arguments = [*TUNE, *(word for override in overrides for word in ("--set", override))]
    status, out, err = run(capsys, *arguments, "--tasks", "upper", "--name", "x")
    assert status == 0, err
    assert manifests.read(copied / "ckpt").sets == {"x": {"upper": best}}
    (row,) = (w for w in map(words, out.splitlines()) if w[:1] == ["upper"])
    expected = [losses[1.0][0], losses[best][0], losses[1.0][1], losses[best][1]]
    assert [float(cell) for cell in row[3:7]] == pytest.approx(expected, abs=1e-3)
    worse = "on the held-out half these weights are worse" in out
    assert worse == (losses[best][1] > losses[1.0][1])


def test_another_folder_than_the_output_of_the_file(copied, capsys, monkeypatch):
    monkeypatch.setattr(module, "GRID", (1.0,))
    (copied / "ckpt").rename(copied / "my: ckpt")
    status, out, err = run(capsys, "tune-weights", "my: ckpt", "tasks.yaml", "--tasks", "all", "--name", "x")
    assert status == 0, err
    assert manifests.read(copied / "my: ckpt").sets == {"x": {"upper": 1.0, "truth": 1.0}}
    assert not (copied / "ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tasks", "upper,math", "--name", "x"), ["there is no task 'math' → choose from: upper, truth"]),
        (("--tasks", "upper,upper", "--name", "x"), ["task 'upper' is named twice"]),
        (("--tasks", "upper:0.5,truth", "--name", "x"), ["--tasks: 'upper:0.5,truth' does not say which weights"]),
        (("--tasks", "base", "--name", "x"), ["--tasks: 'base' does not say which weights"]),
        (("--tasks", "taken", "--name", "x"), ["--tasks: 'taken' does not say which weights"]),
        (("--tasks", "all", "--name", "truth"), ["--name: 'truth' is the name of a task"]),
        (("--tasks", "all", "--name", "all"), ["--name: 'all' is reserved"]),
        (("--tasks", "nope", "--name", "A b"), ["--name: 'A b' is not a valid set name", "'nope'"]),
        (("--tasks", "all", "--name", "taken"), ["a named set 'taken' already (upper)", "--replace"]),
        (("--tasks", "all", "--name", "x", "--set", "tasks.truth.metric=loss"), ["no common mean", "truth: loss"]),
        (("--tasks", "all", "--name", "x", "--set", "tasks.upper.data.eval=null"), ["tasks[0].data.eval", "no eval"]),
        (("--tasks", "all", "--name", "x", "--limit", "1"), ["has one example, which cannot be split in two"]),
        (("--tasks", "all", "--name", "x", "--set", "tasks.upper.alpha=3"), ["tasks[0].alpha"]),
    ],
)
def test_mistakes_are_named_and_nothing_is_stored(copied, capsys, arguments, says):
    Checkpoint.open(copied / "ckpt").set_named_set("taken", {"upper": 1.0})
    before = digests(copied / "ckpt")
    status, out, err = run(capsys, *TUNE, *arguments)
    assert (status, out) == (2, "")
    assert all(text in err for text in says), err
    assert "→" in err and "Traceback" not in err
    assert digests(copied / "ckpt") == before


def test_tasks_that_the_file_does_not_have_are_named(copied, capsys):
    head, upper, truth = re.split(r"(?m)^(?=  - name)", TASKS)
    (copied / "tasks.yaml").write_text(head + truth + upper.replace("upper\n", "lower\n    sparsity: 0.9\n", 1))
    status, _, err = run(capsys, *TUNE, "--tasks", "all", "--name", "lower")
    assert status == 2
    assert "the file has no task 'upper'" in err and "'lower' is the name of a task of this file" in err


def test_it_waits_for_no_other_writer(copied, capsys, tmp_path):
    with open(copied / "ckpt/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = run(capsys, *TUNE, "--tasks", "all", "--name", "x")
    assert status == 2 and "another process" in err
    status, _, err = run(capsys, "tune-weights", str(tmp_path / "none"), "tasks.yaml", "--tasks", "a", "--name", "x")
    assert status == 2 and "there is no loraf.json" in err and not (tmp_path / "none").exists()


def test_too_small_a_limit_is_what_has_to_be_changed(copied, capsys):
    _, _, err = run(capsys, *TUNE, "--tasks", "all", "--name", "x", "--limit", "1")
    assert err.count("set --limit to 2 or more") == 3 and "use more records" not in err


def test_weights_without_a_finite_score_are_not_stored(copied, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *_: [types.SimpleNamespace(score=math.nan)])
    before = digests(copied / "ckpt")
    status, _, err = run(capsys, *TUNE, "--tasks", "all", "--name", "x")
    assert status == 2 and "no weights were found with which every score is a finite number" in err
    assert digests(copied / "ckpt") == before
