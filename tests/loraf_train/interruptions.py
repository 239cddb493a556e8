"""What tests of interrupted runs share: a run with everything that may go wrong in it, an observer that stops it."""

from __future__ import annotations

from pathlib import Path

from loraf_train.sequence import runner
from loraf_train.settings.config import RunConfig
from tests.loraf_train import toys

NAMES = ("one", "two")
STEPS = 6


class Stopped(Exception):
    """The end of a process, as far as one test can have it without one."""


class Stopper(runner.Observer):
    """Notes what it hears, and stops the run at an event, for example `("two", "step 4")`.

    Attributes:
        heard: (task, event) in order.
        remarks: what was said of states.
    """

    def __init__(self, *at: str):
        self.at = at
        self.heard: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self._task = ""

    def hear(self, event: str) -> None:
        self.heard.append((self._task, event))
        if (self._task, event) == self.at:
            raise Stopped

    def task_started(self, task):
        self._task = task.name

    def remarked(self, task, remark):
        self.remarks.append(remark)

    def resumed(self, task, after):
        self.hear(f"goes on after {after}")

    def calibration_step(self, loss, step, total):
        self.hear(f"calibration {step}")

    def calibrated(self, task):
        self.hear("calibrated")

    def step(self, loss, lr, step, total):
        self.hear(f"step {step}")

    def adapted(self, task, model):
        self.hear("adapted")

    def task_finished(self, checkpoint, task, model):
        self.hear("finished")


def run_config(
    model: Path, output: Path, seconds: float = 0.0, names: tuple[str, ...] = NAMES, **training
) -> RunConfig:
    """Tasks with dropout, warm-up, a schedule, momentum, weight decay, and two epochs of 3 steps of 2 accumulations."""
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
    return toys.run_config(model, output, *tasks)


def data() -> dict:
    """18 examples: the last step of an epoch has only 2, and so no second accumulation."""
    return {"one": toys.data(3, 18), "two": toys.data(50, 18)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}
