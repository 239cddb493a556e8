"""Finished runs on disk: which are taken over, which are measured again and why, and which are left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loraf_train.compare import methods
from loraf_train.compare.results import Run
from tests.loraf_train.compare_toys import ORDERS, SHORT, comparison


class Counted(methods.Full):
    """Full fine-tuning that records its seeds, and may stop at one; or only pretends to train, for speed."""

    name = "full"

    def __init__(self, stop_at: int | None, pretend: bool):
        self.trained: list[int] = []
        self._stop_at, self._pretend = stop_at, pretend

    def train(self, bench, config, listener):
        if config.seed == self._stop_at:
            raise KeyboardInterrupt
        self.trained.append(config.seed)
        if not self._pretend:
            return super().train(bench, config, listener)
        for task in config.tasks:
            listener.started(task)
            listener.ended(task)
            listener.trained(task, methods.TrainedTask(1, 1, 1))


def without_costs(runs: list[Run]) -> list[Run]:
    return [dataclasses.replace(run, costs=()) for run in runs]


def counted(monkeypatch, stop_at: int | None = None, pretend: bool = False) -> Counted:
    method = Counted(stop_at, pretend)
    monkeypatch.setattr(methods, "ALL", {**methods.ALL, "full": method})
    return method


def test_an_interrupted_comparison_continues_with_the_missing_runs(folder, monkeypatch):
    method = counted(monkeypatch, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        comparison(folder, "sequence", ("full",), (3, 4), SHORT).runs()
    assert method.trained == [3]
    kept = (folder / "out" / "runs" / "full-seed3.json").read_bytes()
    (folder / "out" / "scratch").mkdir(exist_ok=True)  # what a killed run leaves
    (folder / "out" / "scratch" / "left.safetensors").write_bytes(b"half")

    method, printed = counted(monkeypatch), []
    runs = comparison(folder, "sequence", ("full",), (3, 4), SHORT, printed=printed).runs()
    assert method.trained == [4]
    assert printed == ["base: measured before", "full, seed 3: measured before", "full, seed 4:"]
    assert (folder / "out" / "runs" / "full-seed3.json").read_bytes() == kept
    method = counted(monkeypatch)
    assert comparison(folder, "sequence", ("full",), (3, 4), SHORT).runs() == runs
    assert method.trained == []

    (folder / "out").rename(folder / "before")
    undisturbed = comparison(folder, "sequence", ("full",), (3, 4), SHORT).runs()
    assert without_costs(undisturbed) == without_costs(runs)


def change_rate(folder: Path) -> str:
    text = (folder / "tasks.yaml").read_text()
    (folder / "tasks.yaml").write_text(text.replace("learning_rate: 5e-3", "learning_rate: 3e-3"))
    return "settings.upper.training.learning_rate was 0.005, is 0.003; settings.truth.training.learning_rate was"


def change_example(folder: Path) -> str:
    text = (folder / "truth.jsonl").read_text()
    (folder / "truth.jsonl").write_text(text.replace("y0?", "z0?"))
    return "evaluation.truth changed; examples.truth changed"


def change_max_new_tokens(folder: Path) -> str:
    text = (folder / "tasks.yaml").read_text()
    (folder / "tasks.yaml").write_text(text.replace("max_new_tokens: 4", "max_new_tokens: 5"))
    return "scoring.upper.max_new_tokens was 4, is 5"


def damage(folder: Path) -> str:
    file = folder / "out" / "runs" / "full-seed3.json"
    file.write_bytes(file.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    return f"{file} is not usable (it does not match its digest)"


@pytest.mark.parametrize("change", [change_rate, change_example, change_max_new_tokens, damage])
def test_a_run_with_changed_provenance_is_measured_again_with_the_reason(folder, monkeypatch, change):
    counted(monkeypatch, pretend=True)
    comparison(folder, "sequence", ("full",), overrides=SHORT).runs()
    reason = change(folder)
    method, printed = counted(monkeypatch, pretend=True), []
    (run,) = comparison(folder, "sequence", ("full",), (3,), SHORT, printed).runs()
    assert method.trained == [3]
    assert printed[-1].startswith(f"full, seed 3: measured again, because {reason}")
    assert (run.method, run.seed) == ("full", 3)


def test_settings_of_another_method_do_not_matter(folder, monkeypatch):
    counted(monkeypatch, pretend=True)
    comparison(folder, "sequence", ("full",), overrides=SHORT).runs()
    text = (folder / "tasks.yaml").read_text()
    (folder / "tasks.yaml").write_text(text.replace("alpha: 8", "alpha: 32").replace("steps: 2", "steps: 3"))
    method = counted(monkeypatch, pretend=True)
    comparison(folder, "sequence", ("full",), overrides=SHORT).runs()
    assert method.trained == []


def test_a_changed_order_is_measured_again(folder, monkeypatch):
    counted(monkeypatch, pretend=True)
    comparison(folder, "sequence", ("full",), (3, 4), SHORT).runs()
    method, printed = counted(monkeypatch, pretend=True), []
    comparison(folder, "sequence", ("full",), (3, 4), (*SHORT, *ORDERS), printed).runs()
    assert method.trained == [3]
    assert (
        "order was ['upper', 'truth'], is ['truth', 'upper']" in printed[1]
        and printed[2] == "full, seed 4: measured before"
    )


def test_another_text_of_the_base_makes_another_run(folder):
    """The settings hold the name of its file only. Methods without retention do not read it."""
    on = (*SHORT, "retention={base: text.jsonl}")
    (folder / "text.jsonl").write_text('{"text": "a plain sentence"}\n')
    both = ("loraf", "loraf-paper")
    first = comparison(folder, "sequence", both, overrides=on)
    first.runs()
    (folder / "text.jsonl").write_text('{"text": "quite another one"}\n')
    printed: list[str] = []
    again = comparison(folder, "sequence", both, overrides=on, printed=printed, loaded=first.loaded)
    (run,) = dataclasses.replace(again, stored_only=True).runs()
    assert run.method == "loraf-paper"
    assert "loraf, seed 3: left out, because base_text changed" in printed


def test_runs_that_are_stored_and_left_out_are_told_from_missing_ones(folder, monkeypatch):
    counted(monkeypatch, pretend=True)
    comparison(folder, "sequence", ("full",), (3,), SHORT).runs()
    reason = change_rate(folder)
    printed: list[str] = []
    again = comparison(folder, "sequence", ("full",), (3, 4), SHORT, printed)
    assert dataclasses.replace(again, stored_only=True).runs() == []
    assert printed[-2].startswith(f"full, seed 3: left out, because {reason}")
    assert printed[-1] == "full, seed 4: missing"
