"""Early stopping of a task: what is compared, and what of the evaluation data its values depend on.

Compared is the loss per completion token on the task's evaluation sets, whatever its metric: the plain mean over the
sets, each measured as the metric `loss` measures it; of preferences, DPO's loss. All processes measure, and the first
one's number counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loraf_train.adapter.reference import values_off
from loraf_train.data.examples import digest_of
from loraf_train.scoring.evaluate import completion_loss, margins
from loraf_train.sequence.phases import beta_of
from loraf_train.trainer.stopping import Stopping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import EvaluationSet
    from loraf_train.data.task_data import TaskData
    from loraf_train.settings.config import TaskConfig

OnEvaluated = Callable[["TaskConfig", float, int, bool], None]  # task, loss, step from 1, whether it is the best


def stopping_of(model: PreTrainedModel, task: TaskConfig, data: TaskData, on_evaluated: OnEvaluated) -> Stopping | None:
    """Returns the early stopping that a task's settings ask for; None: they ask for none.

    Args:
        model: in which the task's layers are when it is evaluated.
    """
    settings = task.training.early_stopping
    if settings is None:
        return None

    beta = beta_of(task)
    references: dict[str, list[float]] = {}

    def loss_of(evaluation: EvaluationSet) -> float:
        if beta is None:
            return completion_loss(model, evaluation.examples)
        if evaluation.name not in references:  # the same at every step
            with values_off(model):
                references[evaluation.name] = margins(model, evaluation.examples)
        return _preference_loss(margins(model, evaluation.examples), references[evaluation.name], beta)

    def evaluate() -> float:
        losses = [loss_of(evaluation) for evaluation in data.evaluation.values()]
        return sum(losses) / len(losses)

    return Stopping(
        settings.patience,
        settings.every,
        evaluate,
        model.device,
        lambda loss, step, best: on_evaluated(task, loss, step, best),
    )


def _preference_loss(own: Sequence[float], of_reference: Sequence[float], beta: float) -> float:
    """The mean of DPO's loss, −log σ(β·(own − reference)), over pairs."""
    distances = torch.tensor(own, dtype=torch.float64) - torch.tensor(of_reference, dtype=torch.float64)
    return float(-torch.nn.functional.logsigmoid(beta * distances).mean())


def evaluations_of(task: TaskConfig, data: TaskData) -> dict[str, Any]:
    """Returns the digest of the evaluation examples if the task's values depend on them, for its saved states."""
    if task.training.early_stopping is None:
        return {}
    examples = [e for s in data.evaluation.values() for e in s.examples]
    others = [e.rejected for e in examples if e.rejected is not None]
    return {"evaluation": digest_of([e.example for e in examples] + others)}
