"""Applies task sets to the model that is scored, in the way that its weights allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraf.delta import Merger
from loraf_train.adapter.quantised import AttachedMerger, is_quantised_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint


def merger_of(model: PreTrainedModel, checkpoint: Checkpoint) -> Merger | AttachedMerger:
    """Returns what applies a checkpoint's sets to an unsharded model: to its weights, or beside quantised ones."""
    return AttachedMerger(model, checkpoint) if is_quantised_model(model) else Merger(model, checkpoint)
