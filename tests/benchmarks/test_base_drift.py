"""`benchmarks/base_drift.py`: what is trained and measured on, and the table of its runs."""

from __future__ import annotations

import json

import pytest

from benchmarks import base_drift
from loraf_train.settings import loading


def test_the_text_for_protection_shares_nothing_with_that_for_the_drift(tmp_path):
    base_drift.make_data(tmp_path)
    protect, general = (
        {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("protect", "general")
    )
    assert len(protect) > 500 and len(general) > 500 and not protect & general


def test_the_settings_are_those_of_the_example(tmp_path):
    base_drift.make_data(tmp_path / "data")
    config = loading.load(base_drift.write_settings(tmp_path, None), ["retention={budget: 0.4, base: self}"])
    (task,) = config.tasks
    assert (task.name, config.adapter.rank, config.adapter.sparsity) == ("pig-latin", 64, 0.8)
    assert (task.training.learning_rate, task.training.schedule) == (1.6e-2, "cosine")
    assert config.retention.model_dump() == {"budget": 0.4, "base": "self"}


def test_what_is_left_of_the_drift_is_taken_within_a_seed():
    def run(seed: int, protected: str, budget: float | None, score: float, drift: float) -> dict:
        return {"seed": seed, "protected on": protected, "budget": budget, "score": score, "drift": drift}

    runs = [run(0, "none", None, 0.9, 1.0), run(1, "none", None, 1.0, 3.0)]
    runs += [run(0, "self", 0.1, 0.8, 0.5), run(1, "self", 0.1, 1.0, 0.3), run(2, "self", 0.1, 0.0, 9.0)]
    plain, protected = base_drift.summary(runs)
    assert plain["share of the drift left"] == 1.0 and plain["seeds"] == 2
    assert protected["share of the drift left"] == pytest.approx((0.5 + 0.1) / 2)
    assert protected["largest share"] == 0.5
    assert protected["score less the unprotected one"] == pytest.approx(-0.05)
