"""Logs to TensorBoard, Weights & Biases and MLflow through transformers' callbacks, as one run per phase of a task.

    tensorboard    <output>/runs/<task>/<phase>, which TensorBoard shows as the run `task/phase`
    wandb          project WANDB_PROJECT (loraf), group <output's name>/<task>, run `task/phase`, job type the phase
    mlflow         experiment MLFLOW_EXPERIMENT_NAME (loraf) at MLFLOW_TRACKING_URI, run `task/phase`

Only the first process logs. A resumed phase adds to the same TensorBoard folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem, one_line

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from loraf_train.settings.config import RunConfig, TaskConfig

RUNS = "runs"
PROJECT = "loraf"
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}  # tracker → any one of these

Close = Callable[[bool], None]  # whether the phase failed
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # by default 7, each after twice the time: minutes without a word
_RETRIES_AT_START = "2"


@dataclass(frozen=True)
class Tracking:
    """The trackers of a phase, and what they call it.

    Attributes:
        trackers: keys of PACKAGES.
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
    """Reports the trackers in `report_to` that are not installed."""
    requested = dict.fromkeys(tracker for task in config.tasks for tracker in task.training.report_to)
    problems = []
    for tracker in requested:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[tracker]):
            package = PACKAGES[tracker][0]
            remedy = f"`pip install {package}`, or leave {tracker} out"
            message = f"{tracker} needs the package {package!r}, which is not installed"
            problems.append(Problem(message, "training.report_to", str(config.file), remedy))
    return problems


def tracking(task: TaskConfig, output: Path | None, phase: str) -> Tracking | None:
    """Returns the tracking of a task's phase; None if the task has no trackers or `output` is None."""
    requested = task.training.report_to
    return Tracking(requested, output, task.name, phase) if requested and output is not None else None


@contextmanager
def opened(tracking: Tracking | None) -> Iterator[Sequence[TrainerCallback]]:
    """Yields the callbacks of a phase's trackers, and closes their runs at the end: as failed after an exception."""
    from loraf_train.processes import group

    if tracking is None or not group.is_first():
        yield ()
        return
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    callbacks: list[TrainerCallback] = []
    closers: list[Close] = []
    failed = True
    try:
        for tracker in tracking.trackers:
            callback, close = makers[tracker](tracking)
            callbacks.append(callback)
            closers.append(close)
        yield callbacks
        failed = False
    except Exception as error:
        if _is_of_mlflow(error):
            raise _unreachable(error) from error
        raise
    finally:
        for close in closers:
            close(failed)


def _is_of_mlflow(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "mlflow"


def _unreachable(error: Exception) -> ConfigError:
    remedy = "run the command again when it can be reached, and it goes on where it was; or leave mlflow out"
    return ConfigError(Problem(f"MLflow cannot log ({one_line(error)})", "training.report_to", remedy=remedy))


def _tensorboard(tracking: Tracking) -> tuple[TrainerCallback, Close]:
    from transformers.integrations.integration_utils import TensorBoardCallback

    callback = TensorBoardCallback()  # type: ignore[no-untyped-call]  # of transformers
    callback.logging_dir = str(tracking.output / RUNS / tracking.task / tracking.phase)

    def close(failed: bool) -> None:
        if callback.tb_writer is not None:
            callback.tb_writer.close()

    return callback, close


def _wandb(tracking: Tracking) -> tuple[TrainerCallback, Close]:
    import wandb  # type: ignore[import-not-found]  # optional
    from transformers.integrations.integration_utils import WandbCallback, WandbLogModel

    try:
        run = wandb.init(  # the callback uses the open run
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracking.name,
            group=f"{tracking.output.name}/{tracking.task}",
            job_type=tracking.phase,
            reinit="finish_previous",
        )
    except Exception as error:  # of wandb's own: nobody is logged in, nobody answers
        remedy = "call `wandb login`, set WANDB_MODE=offline, or leave wandb out"
        raise ConfigError(
            Problem(f"wandb cannot open a run ({one_line(error)})", "training.report_to", remedy=remedy)
        ) from error
    callback = WandbCallback()  # type: ignore[no-untyped-call]  # of transformers
    callback._log_model = WandbLogModel.FALSE  # or it would upload the whole model

    def close(failed: bool) -> None:
        run.finish(exit_code=1 if failed else 0)

    return callback, close


def _mlflow(tracking: Tracking) -> tuple[TrainerCallback, Close]:
    import mlflow
    from transformers.integrations.integration_utils import MLflowCallback

    own_retries = os.environ.get(_RETRIES)
    os.environ[_RETRIES] = own_retries or _RETRIES_AT_START
    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        tags = {"loraf.task": tracking.task, "loraf.phase": tracking.phase, "loraf.output": tracking.output.name}
        run = mlflow.start_run(run_name=tracking.name, tags=tags, nested=mlflow.active_run() is not None)
    except Exception as error:  # of MLflow's own, of the store's database driver, of the network
        remedy = "set MLFLOW_TRACKING_URI to a store that this machine can open, or leave mlflow out"
        raise ConfigError(
            Problem(f"MLflow cannot open a run ({one_line(error)})", "training.report_to", remedy=remedy)
        ) from error
    finally:
        if own_retries is None:
            del os.environ[_RETRIES]
    callback = MLflowCallback()  # type: ignore[no-untyped-call]  # of transformers; it uses the open run

    def close(failed: bool) -> None:
        try:
            mlflow.flush_async_logging()
            active = mlflow.active_run()
            if active is not None and active.info.run_id == run.info.run_id:
                mlflow.end_run("FAILED" if failed else "FINISHED")
        except Exception as error:  # as above
            if not failed:  # or what ended the phase would be hidden
                raise _unreachable(error) from error

    return callback, close
