"""Early stopping: the values are those of the best evaluation, and a stopped run ends with the same bytes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import ConfigError
from loraf.tasksets import TaskSet
from loraf_train.data.examples import EvaluationExample, EvaluationSet
from loraf_train.scoring.evaluate import completion_loss
from loraf_train.sequence import runner
from loraf_train.settings import loading
from loraf_train.settings.parts import EarlyStoppingConfig, RetentionConfig
from loraf_train.trainer.stopping import Stopping
from tests.loraf_train import toys
from tests.loraf_train.interruptions import Stopped, Stopper, contents
from tests.standins import make_model

STEPS = 12


def data(move: int) -> toys.TaskData:
    """Training on one move, evaluation on another: its loss falls at first, and rises when the task is learned."""
    sets = {
        name: EvaluationSet(name, [EvaluationExample(e, "") for e in toys.examples(other, 6)])
        for name, other in (("near", move), ("far", move + 100))
    }
    return dataclasses.replace(toys.data(move, 18), evaluation=sets)


def config(folder, output, patience, every=1, steps=STEPS, names=("one",), **settings):
    stopping = None if patience is None else EarlyStoppingConfig(patience=patience, every=every)
    training = {"max_steps": steps, "learning_rate": 0.5, "dropout": 0.2, "early_stopping": stopping}
    tasks = [toys.task(name, training=training | {"save_seconds": 0.0}) for name in names]
    return toys.run_config(folder, output, *tasks, adapter={"dtype": "float32"}, **settings)


class Evaluations(Stopper):
    def __init__(self, *at):
        super().__init__(*at)
        self.losses = []

    def evaluated(self, task, loss, step, best):
        self.losses.append((step, loss, best))
        self.record(f"evaluated {step}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(loaded model, config, observer) of a run with more patience than it needs."""
    run = config(folder, tmp_path_factory.mktemp("whole") / "ckpt", STEPS)
    loaded, observer = runner.load_model(run), Evaluations()
    runner.run(run, {"one": data(3)}, observer, loaded)
    return loaded, run, observer


def values(output) -> dict[str, torch.Tensor]:
    return {name: b.values for name, b in Checkpoint.open(output).tasks["one"].items()}


def test_the_values_are_those_of_the_smallest_loss(whole, folder, tmp_path):
    loaded, run, observer = whole
    assert [step for step, *_ in observer.losses] == list(range(1, STEPS + 1))
    best_step, best_loss, _ = min(observer.losses, key=lambda entry: entry[1])
    assert best_step < STEPS, "it would be the last step without early stopping too"
    assert [step for step, _, best in observer.losses if best][-1] == best_step
    shorter = config(folder, tmp_path / "ckpt", None, steps=best_step)
    runner.run(shorter, {"one": data(3)}, None, loaded)
    assert all(torch.equal(value, values(shorter.output)[name]) for name, value in values(run.output).items())
    model, merger = loaded[0], Merger(loaded[0], Checkpoint.open(run.output))
    merger.merge(TaskSet.of({"one": 1.0}, ("one",)))
    losses = [completion_loss(model, s.examples) for s in data(3).evaluation.values()]
    merger.merge(TaskSet())
    assert sum(losses) / 2 == pytest.approx(best_loss, rel=1e-4)
    recorded = Checkpoint.open(run.output).manifest.task("one").training
    assert recorded["early_stopping"] == {"best_step": best_step, "best_loss": best_loss, "last_step": STEPS}
    assert recorded["settings"]["training"]["early_stopping"] == {"patience": STEPS, "every": 1}


def test_a_checkpoint_without_early_stopping_says_nothing_of_it(whole, folder, tmp_path):
    run = config(folder, tmp_path / "ckpt", None, steps=1)
    checkpoint = runner.run(run, {"one": data(3)}, None, whole[0])
    assert "early_stopping" not in str(checkpoint.manifest.task("one").training)


def test_it_ends_when_patience_has_run_out_with_the_same_values(whole, folder, tmp_path):
    loaded, _, observer = whole
    best_step = min(observer.losses, key=lambda entry: entry[1])[0]
    run, stopped = config(folder, tmp_path / "ckpt", 1), Evaluations()
    runner.run(run, {"one": data(3)}, stopped, loaded)
    first_worse = next(step for step, _, best in observer.losses if not best)
    assert stopped.losses == observer.losses[:first_worse]
    training = Checkpoint.open(run.output).manifest.task("one").training
    assert (training["steps"], training["early_stopping"]["best_step"]) == (first_worse, first_worse - 1)
    assert first_worse - 1 <= best_step


PLACES = [("one", "step 2"), ("one", "evaluated 2"), ("one", "evaluated 4"), ("one", "trained")]


@pytest.mark.parametrize("patience", [1, STEPS])
@pytest.mark.parametrize("at", PLACES, ids="-".join)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(whole, folder, tmp_path, at, patience):
    loaded = whole[0]
    run = config(folder, tmp_path / "whole", patience)
    observer = Evaluations()
    runner.run(run, {"one": data(3)}, observer, loaded)
    if at not in observer.events:
        pytest.skip("it ends before")
    again = config(folder, tmp_path / "again", patience)
    with pytest.raises(Stopped):
        runner.run(again, {"one": data(3)}, Evaluations(*at), loaded)
    runner.run(again, {"one": data(3)}, Evaluations(), loaded)
    assert contents(again.output) == contents(run.output)


def test_a_state_is_not_used_with_other_evaluation_records(whole, folder, tmp_path):
    run = config(folder, tmp_path / "ckpt", STEPS)
    with pytest.raises(Stopped):
        runner.run(run, {"one": data(3)}, Evaluations("one", "evaluated 3"), whole[0])
    observer = Evaluations()
    other = dataclasses.replace(data(3), evaluation=data(5).evaluation)
    runner.run(run, {"one": other}, observer, whole[0])
    assert "the evaluation data, which decides when to stop changed" in " ".join(observer.remarks)
    assert observer.events[0] == ("one", "calibration 1")


def test_by_default_it_evaluates_once_an_epoch_and_at_the_end(whole, folder, tmp_path):
    run, observer = config(folder, tmp_path / "ckpt", 9, every=None, steps=7), Evaluations()
    runner.run(run, {"one": data(3)}, observer, whole[0])  # 18 examples, 8 a step: 3 steps an epoch
    assert [step for step, *_ in observer.losses] == [3, 6, 7]


def test_values_beyond_the_budget_of_retention_are_not_kept(whole, folder, tmp_path):
    """The loss alone would choose step 2. At no step is the change of the first task within so small a budget."""
    retention = RetentionConfig(budget=0.02)
    run = config(folder, tmp_path / "ckpt", STEPS, names=("one", "two"), retention=retention)
    checkpoint = runner.run(run, {"one": data(3), "two": data(10)}, Evaluations(), whole[0])
    training = checkpoint.manifest.task("two").training
    assert training["retention"]["spent"]["one"] > 1.1 * 0.02
    assert training["early_stopping"] == {"last_step": STEPS}


def test_ties_and_losses_that_are_no_numbers_are_not_better():
    losses = iter([2.0, math.nan, 1.0, 1.0])
    stopping = Stopping(3, 1, lambda: next(losses), torch.device("cpu"))
    parameter = {"w": torch.nn.Parameter(torch.zeros(1))}
    for step in range(1, 5):
        parameter["w"].data.fill_(step)
        stopping.evaluate(step, parameter, accepted=True)
    stopping.keep_best(parameter)
    assert (stopping.best_step, parameter["w"].item(), stopping.is_over) == (3, 3.0, False)


def test_values_that_are_not_accepted_spend_no_patience():
    stopping = Stopping(1, 1, lambda: 1.0, torch.device("cpu"))
    for step in (1, 2):
        stopping.evaluate(step, {}, accepted=False)
    assert (stopping.best_step, stopping.is_over) == (0, False)
    for step, accepted in ((3, True), (4, False), (5, False)):
        stopping.evaluate(step, {}, accepted)
    assert (stopping.best_step, stopping.is_over) == (3, False)
    stopping.evaluate(6, {}, accepted=True)
    assert stopping.is_over


FILE = """
model: tiny
output: ckpt
training: {{{training}}}
tasks:
  - {{name: a, data: {{train: a.jsonl{data}}}}}
"""


@pytest.mark.parametrize(
    ("training", "data", "field", "message"),
    [
        ("early_stopping: {patience: 2}", "", "training.early_stopping", "no evaluation records"),
        ("early_stopping: {patience: 0}", ", eval: a.jsonl", "training.early_stopping.patience", "out of range"),
        ("early_stopping: {every: 3}", ", eval: a.jsonl", "training.early_stopping.patience", "is missing"),
        ("early_stopping: true", ", eval: a.jsonl", "training.early_stopping", "how patient"),
        (
            "max_steps: 5, early_stopping: {patience: 1, every: 6}",
            ", eval: a.jsonl",
            "training.early_stopping.every",
            "every 6 steps, and has 5",
        ),
    ],
)
def test_what_contradicts_is_refused(tmp_path, training, data, field, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "tasks.yaml").write_text(FILE.format(training=training, data=data))
    with pytest.raises(ConfigError) as caught:
        loading.load(tmp_path / "tasks.yaml")
    (problem,) = caught.value.problems
    assert problem.field == field and message in problem.message and problem.remedy


def test_a_task_may_switch_it_off(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    text = FILE.format(training="early_stopping: {patience: 1}", data="").replace(
        "name: a,", "name: a, training: {early_stopping: off},"
    )
    (tmp_path / "tasks.yaml").write_text(text)
    assert loading.load(tmp_path / "tasks.yaml").tasks[0].training.early_stopping is None
