"""Runs of a comparison: what is scored when, agreement with scoring by hand, and that no run is measured twice."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraf.errors import ConfigError
from loraf_train.compare import methods, stored
from loraf_train.compare.meter import Meter
from loraf_train.compare.results import ALONE, AS_TRAINED, BASE, PAIR, SO_FAR, Change, Run
from loraf_train.sequence import runner
from tests.loraf_train.compare_toys import FILE, ORDERS, SHORT, comparison, write_data

ROOT = Path(__file__).parents[3]
TASKS = ("upper", "truth")
SETS = [("upper", "upper"), ("truth", "one"), ("truth", "two")]
ALL = tuple(methods.ALL)
TOGETHER = ("loraf", "lora")  # trained by two processes


@pytest.fixture(scope="module")
def measured(base_folder, tmp_path_factory):
    """Protocol sequence with all methods and one seed: (the comparison, method → run)."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "base").symlink_to(base_folder)
    write_data(folder)
    (folder / "tasks.yaml").write_text(FILE)
    whole = comparison(folder, "sequence", ALL)
    return whole, {run.method: run for run in whole.runs()}


def answer(model, tokenizer, prompt: list[int], new_tokens: int) -> str:
    """Generates greedily, one token at a time, without a cache."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def by_hand(model, whole) -> dict[tuple[str, str], float]:
    """(task, evaluation set) → share of right answers."""
    tokenizer, shares = whole.loaded[1], {}
    for task in whole.config.tasks:
        for name, evaluation in whole.data[task.name].evaluation.items():
            right = 0
            for example in evaluation.examples:
                text = answer(model, tokenizer, example.prompt_ids, task.max_new_tokens)
                if task.metric == "choice":
                    words = [word for word in re.findall(r"\w+", text, re.ASCII) if word in evaluation.choices]
                    right += words[:1] == [example.expected]
                else:
                    right += text.strip() == example.expected
            shares[task.name, name] = right / len(evaluation.examples)
    return shares


def table(run: Run, acting: str) -> dict[tuple[str, str, str], float]:
    return {(s.after, s.task, s.evaluation): s.score for s in run.scores if s.acting == acting}


def test_every_cell_of_a_sequence_is_scored_with_its_count(measured):
    _, runs = measured
    for run in runs.values():
        trained = ("truth",) if run.method == "joint" else TASKS
        cells = [(after, *place) for after in (BASE, *trained) for place in SETS]
        if run.method == "separate":
            cells.remove(("upper", "truth", "one"))
            cells.remove(("upper", "truth", "two"))
        assert list(table(run, SO_FAR)) == cells
        as_trained = [] if run.method == "joint" else [(task, task, name) for task, name in SETS]
        assert list(table(run, AS_TRAINED)) == as_trained
        masked = run.method in ("loraf", "loraf-paper", "random-mask")
        assert list(table(run, ALONE)) == ([("truth", task, name) for task, name in SETS] if masked else [])
        assert {(s.task, s.evaluation): s.count for s in run.scores} == dict(zip(SETS, (9, 9, 3), strict=True))
        assert [d.after for d in run.drift] == [BASE, *trained]
        assert [c.task for c in run.costs] == list(trained)
        assert run.keeps_copies == (not masked and run.method != "joint")
        assert run.order == TASKS
    learned = {name: table(run, SO_FAR)[run.costs[0].task, "upper", "upper"] for name, run in runs.items()}
    assert all(score > 0 for score in learned.values()), learned  # so that the comparison below means something


@pytest.mark.parametrize("name", ALL)
def test_scores_agree_with_scoring_by_hand(measured, name):
    """The method trains once more, and a plain loop answers every question at each event."""
    whole, runs = measured
    model = runner.load_model(whole.config)[0]
    bench = methods.Bench((model, *whole.loaded[1:]), whole.data, whole.folder.parent / f"by-hand-{name}")
    scores, general, own = {}, {}, {}
    text = whole.general.examples

    def loss() -> float:
        total, tokens = 0.0, 0
        for example in text:
            ids = torch.tensor([example.example.input_ids])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        assert tokens == whole.general.tokens
        return total / tokens

    class ByHand(methods.Listener):
        def trained(self, task, parts):
            held = by_hand(model, whole)
            if name == "separate":
                held = {**own, **{place: s for place, s in held.items() if place[0] == task.name}}
                own.update(held)
            scores.update({(SO_FAR, task.name, *place): s for place, s in held.items()})
            general[task.name] = loss()

        def as_trained(self, task):
            scores.update({(AS_TRAINED, task.name, *place): s for place, s in by_hand(model, whole).items()})

    scores.update({(SO_FAR, BASE, *place): s for place, s in by_hand(model, whole).items()})
    general[BASE] = loss()
    methods.ALL[name].train(bench, whole.config_of(name, 3), ByHand())
    run = runs[name]
    assert table(run, SO_FAR) == {key[1:]: s for key, s in scores.items() if key[0] == SO_FAR}
    for (after, task, evaluation), score in table(run, AS_TRAINED).items():
        acting = SO_FAR if run.keeps_copies else AS_TRAINED
        assert score == scores[acting, after, task, evaluation]
    assert {d.after: d.loss for d in run.drift} == pytest.approx(general, rel=1e-4)


def test_costs_are_measured(measured):
    _, runs = measured
    for run in runs.values():
        for cost in run.costs:
            assert cost.seconds > 0 and cost.trainable > 0 and cost.file_bytes > cost.trainable
            steps = 32 if run.method == "joint" else 16
            assert cost.steps == steps + (2 if run.method in ("loraf", "loraf-paper") else 0)
            assert cost.peak_bytes is None or cost.peak_bytes > 10**7
    sizes = {name: run.costs[0].trainable for name, run in runs.items()}
    assert sizes["loraf"] == sizes["random-mask"] < sizes["frozen-a"] < sizes["lora"] < sizes["full"]
    assert {sizes[name] for name in ALL if "lora" in name and "loraf" not in name} == {sizes["ewc"]} == {sizes["lora"]}
    assert {name for name, run in runs.items() if run.masks} == {"loraf", "loraf-paper", "random-mask"}


def test_in_protocol_single_each_task_starts_from_the_base(folder):
    whole = comparison(folder, "single", ("loraf", "full"))
    loraf, full = whole.runs()
    for run in (loraf, full):
        assert list(table(run, SO_FAR)) == [(BASE, *place) for place in SETS] + [(place[0], *place) for place in SETS]
        assert not table(run, AS_TRAINED)
        assert [d.after for d in run.drift] == [BASE, *TASKS]
    second_alone = whole.config_of("full", 3).model_copy(update={"tasks": whole.config.of_method("full").tasks[1:]})
    model = runner.load_model(whole.config)[0]
    held = {}

    class ByHand(methods.Listener):
        def trained(self, task, parts):
            held.update(by_hand(model, whole))

    bench = methods.Bench((model, *whole.loaded[1:]), whole.data, folder / "by-hand")
    methods.ALL["full"].train(bench, second_alone, ByHand())
    assert table(full, SO_FAR)["truth", "truth", "one"] == held["truth", "one"]


def test_separate_keeps_the_scores_of_protocol_single(folder, measured):
    """Those that LoRA reaches on each task alone, with the same seed."""
    whole = comparison(folder, "single", ("lora",), overrides=("compare.methods.lora.alpha=8",))
    (alone,) = whole.runs()
    kept = table(measured[1]["separate"], SO_FAR)
    for (after, task, evaluation), score in table(alone, SO_FAR).items():
        if after != BASE:
            assert kept[task, task, evaluation] == kept["truth", task, evaluation] == score


def test_each_seed_trains_in_its_order_and_the_run_says_so(folder):
    whole = comparison(folder, "sequence", ("full",), (3, 4), (*SHORT, *ORDERS))
    runs = whole.runs()
    assert [run.order for run in runs] == [TASKS[::-1], TASKS]
    for run in runs:
        assert tuple(cost.task for cost in run.costs) == run.order
        assert tuple(dict.fromkeys(score.after for score in run.scores)) == (BASE, *run.order)
    single = comparison(folder, "single", ("full",), (3,), (*SHORT, *ORDERS)).config_of("full", 3)
    assert tuple(task.name for task in single.tasks) == TASKS


class ThreeTasks(methods.Full):
    """Only pretends to train; then reports one pair, and a change of logits."""

    def train(self, bench, config, listener):
        for task in config.tasks:
            listener.started(task)
            listener.ended(task)
            listener.trained(task, methods.TrainedTask(1, 1, 1))
        listener.changed("upper", "truth", 0.25, 0.5)
        listener.selected(config.tasks)


def test_pairs_and_changes_are_recorded_and_survive_on_disk(folder, monkeypatch):
    monkeypatch.setattr(methods, "ALL", {**methods.ALL, "full": ThreeTasks()})
    (run,) = comparison(folder, "sequence", ("full",), (3,), SHORT).runs()
    pairs = [(s.task, s.partner, s.evaluation, s.after) for s in run.scores if s.acting == PAIR]
    assert pairs == [
        ("upper", "truth", "upper", "truth"), ("truth", "upper", "one", "truth"), ("truth", "upper", "two", "truth"),
    ]  # fmt: skip
    assert run.changes == (Change("upper", "truth", 0.25, 0.5),)
    assert comparison(folder, "sequence", ("full",), (3,), SHORT).runs() == [run]


def test_the_model_is_the_base_again_after_all_runs(measured):
    whole, _ = measured
    fresh = runner.load_model(whole.config)[0].state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in whole.loaded[0].state_dict().items())
    assert not (whole.folder / "scratch").exists()


def test_a_diverged_run_is_reported_with_its_method_and_finished_runs_stay(folder):
    overrides = (*SHORT, "compare.methods.full.training.learning_rate=1e38")
    with pytest.raises(ConfigError, match=r"full, seed 3: .* is (nan|inf).*rate") as caught:
        comparison(folder, "sequence", ("random-mask", "full"), overrides=overrides).runs()
    assert len(caught.value.problems) == 1
    assert (folder / "out" / "runs" / "random-mask-seed3.json").exists()
    assert not (folder / "out" / "runs" / "full-seed3.json").exists()


def test_a_stored_run_is_read_back_unchanged(measured, tmp_path):
    _, runs = measured
    for run in runs.values():
        stored.keep(tmp_path / "run.json", {"a": (1, 2)}, run)
        assert stored.find(tmp_path / "run.json", {"a": [1, 2]}) == (run, "")
        assert stored.find(tmp_path / "run.json", {"a": [1, 3]}) == (None, "a was [1, 2], is [1, 3]")
    (tmp_path / "run.json").write_text(json.dumps({"format": "another"}))
    assert stored.find(tmp_path / "run.json", {})[0] is None
    assert stored.find(tmp_path / "none.json", {}) == (None, "")


# --- the parts --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports and resets a process's peak memory")
def test_the_meter_counts_memory_freed_in_between_and_none_from_before():
    meter = Meter(torch.device("cpu"))
    before = torch.ones(64 << 20, dtype=torch.uint8)
    del before
    meter.start()
    seconds, resting = meter.stop()
    meter.start()
    within = torch.ones(64 << 20, dtype=torch.uint8)
    del within
    longer, peak = meter.stop()
    if resting is None:
        pytest.skip("this container may not reset the peak")
    assert seconds >= 0 and longer > 0 and math.isfinite(longer)
    assert peak - resting > 60 << 20


# --- several processes ------------------------------------------------------------------------------------------


def child(rank: int, port: int, folder: Path) -> None:
    """What accelerate launch sets, and nothing else."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from loraf_train.processes import group

    group.join(torch.device("cpu"))
    runs = comparison(folder, "sequence", TOGETHER, overrides=SHORT).runs()
    answer = [dataclasses.asdict(run) for run in runs]
    (folder / f"answer-{rank}.json").write_text(json.dumps(answer))


def launch(folder: Path) -> int:
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank, port, folder)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    return max(abs(process.exitcode) for process in children)


def test_two_processes_measure_what_one_measures(folder):
    command = [sys.executable, "-m", __name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(2))
    assert [run["costs"] for run in second] == [[]] * len(TOGETHER)  # only the first process measures
    (folder / "out").rename(folder / "together")
    for run, alone in zip(first, comparison(folder, "sequence", TOGETHER, overrides=SHORT).runs(), strict=True):
        assert run["method"] == alone.method
        assert [d["loss"] for d in run["drift"]] == pytest.approx([d.loss for d in alone.drift], rel=0.001)
        assert [c["trainable"] for c in run["costs"]] == [c.trainable for c in alone.costs]
        assert [c["file_bytes"] for c in run["costs"]] == [c.file_bytes for c in alone.costs]
        assert [s["count"] for s in run["scores"]] == [s.count for s in alone.scores]


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1])))
