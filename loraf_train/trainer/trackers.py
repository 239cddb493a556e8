"""TensorBoard and Weights & Biases, through transformers' own callbacks. Each phase of each task is a run of its own.

    tensorboard    <output>/runs/<task>/<phase>, which TensorBoard shows as the run `task/phase`
    wandb          project WANDB_PROJECT (loraf), group <output's name>/<task>, run `task/phase`, job type the phase

Only the first process writes. A phase that goes on after an interruption adds to the same TensorBoard folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from loraf_train.settings.config import RunConfig, TaskConfig

RUNS = "runs"
PROJECT = "loraf"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any one of them


@dataclass(frozen=True)
class Tracking:
    """Who is told of a phase, and under which name.

    Attributes:
        trackers: names of PACKAGES.
        output: the checkpoint's folder.
    """

    trackers: tuple[str, ...]
    output: Path
    task: str
    phase: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.phase}"


def missing(config: RunConfig) -> list[Problem]:
    """Trackers that the file asks for and that are not installed."""
    asked = dict.fromkeys(tracker for task in config.tasks for tracker in task.training.report_to)
    problems = []
    for tracker in asked:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[tracker]):
            package = PACKAGES[tracker][0]
            remedy = f"`pip install {package}`, or leave {tracker} out"
            message = f"{tracker} needs the package {package!r}, which is not installed"
            problems.append(Problem(message, "training.report_to", str(config.file), remedy))
    return problems


def tracking(task: TaskConfig, output: Path | None, phase: str) -> Tracking | None:
    """Who is told of a phase of a task; None: nobody, or there is no place for it."""
    asked = task.training.report_to
    return Tracking(asked, output, task.name, phase) if asked and output is not None else None


@contextmanager
def opened(tracking: Tracking | None) -> Iterator[Sequence[TrainerCallback]]:
    """The callbacks of a phase's trackers; their runs are closed at the end, as failed where an exception passes."""
    from loraf_train.processes import group

    if tracking is None or not group.is_first():
        yield ()
        return
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    callbacks, closers = [], []
    failed = True
    try:
        for tracker in tracking.trackers:
            callback, close = makers[tracker](tracking)
            callbacks.append(callback)
            closers.append(close)
        yield callbacks
        failed = False
    finally:
        for close in closers:
            close(failed)


def _tensorboard(tracking: Tracking):
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(tracking.output / RUNS / tracking.task / tracking.phase)

    def close(failed: bool) -> None:
        if callback.tb_writer is not None:
            callback.tb_writer.close()

    return callback, close


def _wandb(tracking: Tracking):
    import wandb
    from transformers.integrations import WandbCallback
    from transformers.integrations.integration_utils import WandbLogModel

    run = wandb.init(  # the callback takes the run that is open
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=tracking.name,
        group=f"{tracking.output.name}/{tracking.task}",
        job_type=tracking.phase,
        reinit="finish_previous",
    )
    callback = WandbCallback()
    callback._log_model = WandbLogModel.FALSE  # it would upload the whole model; the adapter is in the checkpoint

    def close(failed: bool) -> None:
        run.finish(exit_code=1 if failed else 0)

    return callback, close
