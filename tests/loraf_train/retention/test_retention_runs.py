"""Retention in a run: what is stored, what is kept, how an interrupted or older run goes on.

That runs resume bit for bit with retention on is tested in sequence/test_resume.py, and that two processes, packing,
micro-batches and FSDP agree with one process in processes/test_processes.py.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import CorruptCheckpoint
from loraf_train.adapter.trainable_base import TrainableBase, find_targets, projections
from loraf_train.retention.gather import gather
from loraf_train.retention.measured import completion_logits, root_mean_square_change
from loraf_train.retention.of_checkpoint import gather_again, protected_tasks, stored_statistics
from loraf_train.retention.statistics import mean_square_change
from loraf_train.sequence import runner
from loraf_train.sequence.phases import TRAINING_SEED, seeds_of
from loraf_train.settings.parts import RetentionConfig
from tests.loraf_train import toys
from tests.loraf_train.interruptions import Stopped, Stopper, contents
from tests.standins import make_model

MOVES = {"one": 3, "two": 50, "three": 90}
DATA = {name: toys.data(move, 24) for name, move in MOVES.items()}
ON = RetentionConfig(budget=0.05)


class Listener(Stopper):
    def __init__(self, *at: str):
        super().__init__(*at)
        self.spent: dict[str, dict[str, float]] = {}
        self.lacking: list[str] = []

    def retained(self, task, spent, budget):
        self.spent[task.name] = dict(spent)

    def unprotected(self, tasks):
        self.lacking += tasks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def config(model_folder, output, retention, names=tuple(MOVES), start="previous", **training):
    settings = {"max_steps": 100, "schedule": "cosine"} | training
    tasks = [toys.task(name, start=start, training=settings) for name in names]
    return toys.run_config(model_folder, output, *tasks, retention=retention)


def trained(model_folder, output, retention, **options):
    listener = Listener()
    checkpoint = runner.run(config(model_folder, output, retention, **options), DATA, listener)
    return checkpoint, listener


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: trained(model_folder, folder / name, on) for name, on in {"on": ON, "off": None}.items()}


def changes(model_folder, checkpoint: Checkpoint) -> dict[str, float]:
    """Task → how much its logits have changed at the end since it was trained, measured."""
    model = toys.load(model_folder)
    merger = Merger(model, checkpoint)
    found = {}
    for name in checkpoint.manifest.task_names[:-1]:
        logits = []
        for task_set in (checkpoint.manifest.as_trained(name), checkpoint.manifest.all_tasks()):
            merger.merge(task_set)
            logits.append(completion_logits(model, DATA[name].train, toys.PAD))
        found[name] = root_mean_square_change(*logits)
    return found


def test_off_stores_nothing_and_says_version_1(runs):
    checkpoint, listener = runs["off"]
    assert checkpoint.manifest.format_version == 1 and not (checkpoint.path / "statistics").exists()
    assert not listener.spent and all("retention" not in task.training for task in checkpoint.manifest.tasks)


def test_the_first_task_is_trained_as_without_retention(runs):
    on, off = (runs[name][0] for name in ("on", "off"))
    assert on.manifest.task("one").file == off.manifest.task("one").file
    assert on.manifest.task("two").file != off.manifest.task("two").file


def test_earlier_tasks_keep_within_the_budget(runs, model_folder):
    checkpoint, listener = runs["on"]
    assert listener.spent.keys() == {"two", "three"} and listener.spent["three"].keys() == {"one", "two"}
    assert all(change < 1.15 * ON.budget for spent in listener.spent.values() for change in spent.values())
    assert checkpoint.manifest.task("three").training["retention"] == {
        "budget": ON.budget,
        "spent": listener.spent["three"],
    }
    on, off = (changes(model_folder, runs[name][0]) for name in ("on", "off"))
    assert all(on[name] < 0.3 * off[name] for name in on), (on, off)


def test_what_was_spent_is_what_all_later_tasks_together_change(runs):
    """From the stored, rounded values and statistics alone."""
    checkpoint, listener = runs["on"]
    for task in protected_tasks(checkpoint)[:-1]:
        deltas = {}
        for module, later in task.later.items():
            shape = (checkpoint.manifest.modules[module].d_out, checkpoint.manifest.rank)
            d = torch.zeros(shape[0] * shape[1])
            d[later.positions.long()] = later.values
            deltas[module] = d.view(shape)
        spent = mean_square_change(task.statistics, deltas) ** 0.5
        assert spent == pytest.approx(listener.spent["three"][task.name], rel=1e-3)


def test_with_start_base_earlier_tasks_are_protected_too(model_folder, tmp_path):
    checkpoint, listener = trained(model_folder, tmp_path / "ckpt", ON, start="base")
    assert checkpoint.manifest.task("three").trained_with == ()
    assert all(change < 1.15 * ON.budget for change in listener.spent["three"].values())


def test_an_unfinished_task_begun_without_retention_ends_without_it(model_folder, tmp_path, runs):
    output = tmp_path / "ckpt"
    on = config(model_folder, output, ON, names=("one", "two"), save_seconds=0.0)
    shutil.copytree(runs["on"][0].path, output)
    for name in ("three", "two"):
        Checkpoint.remove_task(output, name)
    with pytest.raises(Stopped):
        runner.run(on.model_copy(update={"retention": None}), DATA, Listener("two", "step 50"))
    listener = Listener()
    checkpoint = runner.run(on, DATA, listener)
    assert "this task was begun without retention, and ends without it" in listener.remarks
    assert "resumes after training step 49 of 100" in [event for _, event in listener.events]
    assert checkpoint.manifest.task("two").file == runs["off"][0].manifest.task("two").file
    assert not listener.spent and checkpoint.manifest.task("two").statistics is not None


def test_tasks_without_statistics_are_named_and_protected_afterwards(model_folder, tmp_path, runs):
    output = tmp_path / "ckpt"
    shutil.copytree(runs["off"][0].path, output)
    for name in ("three", "two"):
        Checkpoint.remove_task(output, name)
    listener = Listener()
    checkpoint = runner.run(config(model_folder, output, ON, names=("one", "two")), DATA, listener)
    assert listener.lacking == ["one"] and not listener.spent
    assert [task.statistics is None for task in checkpoint.manifest.tasks] == [True, False]
    model = toys.load(model_folder)
    targets = find_targets(model, ("q_proj", "v_proj", "down_proj"))
    base = TrainableBase(model, targets, projections(checkpoint, targets), toys.PAD)
    seed = seeds_of(0, "one")[TRAINING_SEED]
    checkpoint.set_statistics("one", gather_again(base, checkpoint, "one", DATA["one"].train, seed))
    afterwards, at_the_end = (stored_statistics(c, "one") for c in (checkpoint, runs["on"][0]))
    deltas = {name: torch.randn(len(s.rest), len(s.factor)) for name, s in at_the_end.items()}
    assert mean_square_change(afterwards, deltas) == pytest.approx(mean_square_change(at_the_end, deltas), rel=1e-3)
    runner.run(config(model_folder, output, ON), DATA, again := Listener())
    assert again.spent["three"].keys() == {"one", "two"} and not again.lacking


def test_damaged_statistics_stop_a_run_before_it_trains(model_folder, tmp_path, runs):
    output = tmp_path / "ckpt"
    shutil.copytree(runs["on"][0].path, output)
    Checkpoint.remove_task(output, "three")
    file = output / "statistics/one.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    before = contents(output)
    with pytest.raises(CorruptCheckpoint, match="was changed after it had been written"):
        runner.run(config(model_folder, output, ON), DATA)
    assert contents(output) == before


def test_a_base_in_bfloat16_is_protected_as_well(model_folder, tmp_path):
    on = config(model_folder, tmp_path / "ckpt", ON, names=("one", "two")).model_copy(update={"precision": "bfloat16"})
    listener = Listener()
    runner.run(on, DATA, listener)
    assert listener.spent["two"]["one"] < 1.15 * ON.budget


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), NotImplementedError("no embedding")])
def test_a_task_whose_statistics_fail_is_kept_without_them(model_folder, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("loraf_train.retention.of_task.gather", fail)
    on = config(model_folder, tmp_path / "ckpt", ON, names=("one",), max_steps=2)
    checkpoint = runner.run(on, DATA, listener := Listener())
    assert checkpoint.manifest.task("one").statistics is None
    (remark,) = listener.remarks
    assert "statistics could not be gathered (" in remark and str(error) in remark


def test_no_more_is_computed_at_once_than_in_training(model_folder, tmp_path, monkeypatch):
    seen = []

    def spy(*arguments, tokens_at_once, **keywords):
        seen.append(tokens_at_once)
        return gather(*arguments, tokens_at_once=tokens_at_once, **keywords)

    monkeypatch.setattr("loraf_train.retention.of_task.gather", spy)
    on = config(model_folder, tmp_path / "ckpt", ON, names=("one",), max_steps=2, micro_batch_size=2)
    runner.run(on, DATA)
    assert seen == [2 * max(len(example.input_ids) for example in DATA["one"].train)]
