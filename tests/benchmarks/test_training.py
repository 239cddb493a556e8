"""`benchmarks/training.py` on a toy model: its checks before timing, its rounds and its tables."""

from __future__ import annotations

import gc
import json
import random
import threading
from multiprocessing import Pipe

import pytest
import torch

from benchmarks import training
from benchmarks.training_methods import METHODS, Cell, Method, Setting
from loraf_train.adapter.layer import LorafLinear

SETTING = Setting("toy", torch.float32, "cpu", rank=8, sparsity=0.9, sequence=32)
CELLS = [Cell(2, 0.0, False), Cell(2, 0.05, True)]


class InThread(training.Process):
    """A worker that is a thread instead of a process, so that torch is not imported again for each."""

    def __init__(self, name: str, setting: Setting, threads: int):
        self.name = name
        self._connection, theirs = Pipe()
        self._process = threading.Thread(target=training.serve, args=(theirs, name, setting, threads), daemon=True)
        self._process.start()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_optimizer_state_and_saved_tensors_follow_the_formula(dtype):
    held = training.verify(Setting(**vars(SETTING) | {"dtype": dtype}), list(METHODS))
    assert max(held["largest relative difference of gradients"].values()) < 1e-12
    for measured, expected in held["gradient and optimizer bytes at sparsity, as K says"].values():
        assert measured == expected > 0
    for costs in held["bytes kept for backward, a token and layer"].values():
        measured, arithmetic = costs["measured"], costs["arithmetic"]
        assert measured["loraf"] == arithmetic["loraf"] < measured["lora-half"] <= measured["lora"]
        if "lora" in arithmetic:
            assert measured["lora-half"] == arithmetic["lora"]


def test_a_wrong_gradient_is_detected(monkeypatch):
    right = LorafLinear.gradient
    monkeypatch.setattr(LorafLinear, "gradient", lambda layer, g, z: right(layer, g, z).roll(1))
    with pytest.raises(SystemExit, match="not those of the dense formula"):
        training.verify(SETTING, ["loraf"])


def test_optimizer_state_beyond_k_is_detected(monkeypatch):
    correct = Method.bytes
    more = {"optimizer_bytes": 1}
    monkeypatch.setattr(Method, "bytes", lambda method: {k: v + more.get(k, 0) for k, v in correct(method).items()})
    with pytest.raises(SystemExit, match="not proportional to K"):
        training.verify(SETTING, ["loraf"])


@pytest.mark.parametrize("one_at_a_time", [False, True], ids=["together", "one at a time"])
def test_rounds_measure_every_method(monkeypatch, one_at_a_time):
    """`one at a time` is how methods share a GPU; here a batch limit stands for full memory."""
    step = Method.step

    def limited(method, batch):
        if len(batch["labels"]) > (2 if method.name == "full" else 4):
            raise torch.OutOfMemoryError
        step(method, batch)

    monkeypatch.setattr(Method, "step", limited)
    gc.collect()  # what other tests left would make the process smaller while it is measured
    monkeypatch.setattr(training.gc, "collect", lambda: 0)  # a second each in a process with everything imported
    processes = [InThread(name, SETTING, 1) for name in ("loraf", "lora", "full")]
    run = training.Run(processes, CELLS, one_at_a_time)
    run.begin()
    losses = [fact["first_loss"] for fact in run.facts.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    drawn = random.Random(0)
    rounds = 1 if one_at_a_time else 2
    for _ in range(rounds):
        run.round(drawn)
    run.end(largest=one_at_a_time)
    for process in processes:
        process.end()
    rows = {(row["method"], row["cell"]): row for row in run.table(SETTING.sequence)}
    assert len(rows) == 2 * 2 + 1  # no dropout for full fine-tuning
    for (name, cell), row in rows.items():
        assert row["seconds"]["n"] == rounds and row["seconds"]["median"] > 0
        assert row["tokens_per_second"]["median"] > 0 and row["memory"]["peak_bytes"] > 0
        trainable = run.facts[name]["trainable"]
        assert row["memory"]["gradient_bytes"] == 4 * trainable and row["memory"]["optimizer_bytes"] == 8 * trainable
        if name == "lora":
            assert row["seconds_to_lora"] == {"median": 1, "low": 1, "high": 1, "n": rounds}
        if one_at_a_time:
            assert row["largest"]["batch"] == (2 if name == "full" else 4)
        if name == "loraf":
            other = rows["lora", cell]["memory"]
            for what in ("rise_bytes", "flops", "gradient_bytes", "optimizer_bytes"):
                assert row["memory"][what] < other[what]
    assert run.facts["loraf"]["file_bytes"] < run.facts["lora"]["file_bytes"] < run.facts["full"]["file_bytes"]
    json.dumps(run.table(SETTING.sequence))


def test_a_failing_worker_reports_its_error():
    process = InThread("lora", SETTING, 1)
    with pytest.raises(RuntimeError, match="lora: turn: AttributeError"):
        process.ask("turn", CELLS[0], 1)
