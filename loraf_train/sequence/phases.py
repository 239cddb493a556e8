"""The two phases of a task as its settings declare them: calibration picks its positions, training their values.

Both run with the task's `training:` settings. Everything that calibration does differently is in `calibration_phase`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraf_train.trainer import loop, trackers
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from loraf_train.settings.config import TaskConfig

DEFAULT_BETA = 0.1  # TRL's
CALIBRATION, TRAINING = "calibration", "training"

# Labels from which the phases' seeds are derived; manifests store the seeds under them. Training was once called
# adaptation: another label would give other seeds, and so other values.
CALIBRATION_SEED, TRAINING_SEED = "calibration", "adaptation"


def seeds_of(run_seed: int, task: str) -> dict[str, int]:
    """Returns the seed of each phase of a task, by CALIBRATION_SEED and TRAINING_SEED."""
    return {label: derived_seed(run_seed, task, label) for label in (CALIBRATION_SEED, TRAINING_SEED)}


def beta_of(task: TaskConfig) -> float | None:
    """Returns DPO's beta; None: the task learns from completions."""
    return (task.training.beta or DEFAULT_BETA) if task.objective == "dpo" else None


def calibration_phase(task: TaskConfig, seed: int, output: Path | None = None) -> loop.Phase:
    """A few mini-batches at a constant rate, without weight decay or clipping (Algorithm 1).

    Args:
        seed: determines the mini-batches.
        output: the checkpoint's folder, in which trackers write; None: no tracking.
    """
    calibration = task.calibration
    assert calibration.learning_rate is not None and calibration.batch_size is not None  # CalibrationConfig.resolved
    changes = {
        "learning_rate": calibration.learning_rate,
        "batch_size": calibration.batch_size,
        "max_steps": calibration.steps,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "early_stopping": None,
    }
    return loop.Phase(
        name=f"calibration of task {task.name!r}",
        seed=seed,
        settings=task.training.model_copy(update=changes),
        optimizer=calibration.optimizer,
        tracking=trackers.tracking(task, output, CALIBRATION),
        beta=beta_of(task),
    )


def training_phase(task: TaskConfig, seed: int, output: Path | None = None) -> loop.Phase:
    """The task's training with AdamW.

    Args:
        seed: determines the order of the examples and dropout.
        output: the checkpoint's folder, in which trackers write; None: no tracking.
    """
    return loop.Phase(
        name=f"training of task {task.name!r}",
        seed=seed,
        settings=task.training,
        tracking=trackers.tracking(task, output, TRAINING),
        beta=beta_of(task),
    )
