"""Shared by the tests of interrupted runs: a run that uses every kind of state, and an observer that stops it."""

from __future__ import annotations

from pathlib import Path

from loraf_train.sequence import runner
from loraf_train.settings.config import RunConfig
from loraf_train.settings.parts import RetentionConfig
from tests.loraf_train import toys

NAMES = ("one", "two")
STEPS = 6


class Stopped(Exception):
    """Stands for the end of the process within a test."""


class Stopper(runner.Observer):
    """Records events, and stops the run at one of them, for example `("two", "step 4")`.

    Attributes:
        events: (task, event) in order.
        remarks: on the saved states.
    """

    def __init__(self, *at: str):
        self.at = at
        self.events: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self._task = ""

    def record(self, event: str) -> None:
        self.events.append((self._task, event))
        if (self._task, event) == self.at:
            raise Stopped

    def task_started(self, task):
        self._task = task.name

    def remarked(self, task, remark):
        self.remarks.append(remark)

    def resumed(self, task, after):
        self.record(f"resumes after {after}")

    def calibration_step(self, loss, step, total):
        self.record(f"calibration {step}")

    def calibrated(self, task):
        self.record("calibrated")

    def step(self, loss, lr, step, total):
        self.record(f"step {step}")

    def trained(self, task, model):
        self.record("trained")

    def task_finished(self, checkpoint, task, model):
        self.record("finished")


def run_config(
    model: Path, output: Path, seconds: float = 0.0, names: tuple[str, ...] = NAMES, **training
) -> RunConfig:
    """Tasks with retention, dropout, warm-up, schedule, momentum, weight decay; 2 epochs of 3 steps of 2 batches."""
    settings = {
        "max_steps": None,
        "epochs": 2.0,
        "dropout": 0.3,
        "micro_batch_size": 4,
        "schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "save_seconds": seconds,
    }
    tasks = [toys.task(name, training=settings | training) for name in names]
    return toys.run_config(model, output, *tasks, retention=RetentionConfig(budget=0.05))


def data() -> dict:
    """18 examples: the last step of an epoch has only 2, so it does not accumulate."""
    return {"one": toys.data(3, 18), "two": toys.data(50, 18)}


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}
