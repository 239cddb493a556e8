"""By how much logits have really changed, to hold against what the statistics predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loraf_train.data.examples import IGNORED
from loraf_train.trainer.batches import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import Example


@torch.no_grad()
def completion_logits(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 32
) -> torch.Tensor:
    """Returns the logits of every completion token less their mean, (tokens, vocabulary), on the CPU.

    The model must be in evaluation mode.
    """
    parts = []
    for begin in range(0, len(examples), batch_size):
        batch = Collator(pad_id)(examples[begin : begin + batch_size])
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        labelled = (batch["labels"][:, 1:] != IGNORED).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][labelled].float()
        parts.append((logits - logits.mean(-1, keepdim=True)).cpu())
    return torch.cat(parts)


def root_mean_square_change(before: torch.Tensor, now: torch.Tensor) -> float:
    """Returns the root mean square change of a logit between two results of `completion_logits`."""
    return float((now - before).square().mean().sqrt())
