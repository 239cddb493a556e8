"""What a model can hold: token ids within its embedding, and positions within its tables of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LARGEST_OFFSET = 8  # rows that a table of positions has before the first position, or after the last (OPT: 2)


def vocabulary(model: PreTrainedModel) -> int:
    """Returns the number of rows of the model's embedding: no token id may reach it."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def context(model: PreTrainedModel) -> int | None:
    """Returns the longest sequence that the model's config speaks of, in tokens; None if it speaks of none."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def positions(model: PreTrainedModel) -> int | None:
    """Returns the longest sequence that the model can read at all, in tokens; None if there is no such limit.

    A model that learned an embedding of each position, or computed one for each in advance, has a table and cannot
    read beyond its end (GPT-2, OPT, GPT-J). A model with rotary embeddings has none: `context` is advice.
    """
    longest, embedding = context(model), model.get_input_embeddings()
    if longest is None:
        return None
    limits = [
        min(longest, rows if module.padding_idx is None else rows - module.padding_idx - 1)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not embedding
        and longest <= (rows := module.num_embeddings) <= longest + _LARGEST_OFFSET
    ]
    tables = any(
        longest <= length <= longest + _LARGEST_OFFSET for buffer in model.buffers() for length in buffer.shape
    )
    return min(limits, default=longest if tables else None)


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Returns an id to pad batches with. Any that the embedding has would do: attention and loss skip it.

    Args:
        rows: of the embedding. A tokenizer may name a padding token beyond it.
    """
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and 0 <= i < rows)
