"""Packs several examples into one row, each as if it were alone: block-diagonal attention, position ids from 0.

    row             a a a a | b b b | c c c c c | pad pad
    position ids    0 1 2 3 | 0 1 2 | 0 1 2 3 4 | 0   1

transformers (5.19, `masking_utils.find_packed_sequence_indices`) starts another sequence wherever a position id does
not follow the one before, and restricts attention to the sequence, within a sliding window too. This requires
position_ids, no attention_mask and no cache. `require_separate` tests before training whether a model supports it.

A step sees the same examples and divides by the same number of tokens as without packing, and dropout is drawn by
example and place, so its gradient is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf.errors import ConfigError, Problem
from loraf_train.data.examples import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import Example

_TRIAL_LENGTH = 8  # tokens of each test sequence
_LEAK = 0.1  # share of the effect of full attention that counts as a leak
_ROUNDING = 4  # multiples of the dtype's epsilon by which sums in another order may differ


@dataclass(frozen=True)
class PackingCollator:
    """Packs examples into rows of up to `row_length` tokens; a longer example gets a row to itself."""

    pad_id: int
    row_length: int

    def rows(self, examples: Sequence[Example]) -> list[list[int]]:
        """Returns the indices of the examples in each row."""
        return first_fit([len(e.input_ids) for e in examples], self.row_length)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Returns input_ids, position_ids and labels, each (rows, longest) int64."""
        rows = self.rows(examples)
        width = max(sum(len(examples[i].input_ids) for i in row) for row in rows)
        ids, position_ids, labels = [], [], []
        for row in rows:
            packed = [examples[i] for i in row]
            padding = width - sum(len(e.input_ids) for e in packed)
            ids.append([token for e in packed for token in e.input_ids] + [self.pad_id] * padding)
            lengths = [*(len(e.input_ids) for e in packed), padding]
            position_ids.append([i for length in lengths for i in range(length)])
            labels.append([label for e in packed for label in e.labels()] + [IGNORED] * padding)
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(position_ids),
            "labels": torch.tensor(labels),
        }


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns each length, in order, to the first row with room for it. Returns the indices of each row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        row = next((r for r, free in enumerate(room) if length <= free), None)
        if row is None:
            rows.append([i])
            room.append(capacity - length)
        else:
            rows[row].append(i)
            room[row] -= length
    return rows


@torch.no_grad()
def require_separate(model: PreTrainedModel, field: str = "training.packing") -> None:
    """Tests on two sequences in one row that the model's output for the second does not depend on the first.

    Its output is compared with that for the second sequence alone, and the difference with the one that arises when
    the second sequence attends to the first.

    Raises:
        ConfigError: the model mixes the sequences of a row (its attention mask ignores position ids, or it has a
            recurrent state), or does not accept position_ids.
    """
    was_training = model.training
    model.train(False)
    try:
        first, second = _trial_ids(model)
        position_ids = torch.arange(2 * _TRIAL_LENGTH, device=model.device)
        pair = torch.stack([torch.cat([first, second]), torch.cat([second, second])])
        alone = _logits(model, second[None], position_ids[None, :_TRIAL_LENGTH])[0]
        packed = _logits(model, pair, (position_ids % _TRIAL_LENGTH).expand(2, -1))[:, _TRIAL_LENGTH:]
        mixed = _logits(model, pair, position_ids.expand(2, -1))[:, _TRIAL_LENGTH:]
    except TypeError as error:
        message = f"the model does not accept position_ids ({error})"
        raise ConfigError(Problem(message, field, remedy="set packing: false")) from None
    finally:
        model.train(was_training)
    difference = (packed - alone).abs().mean()
    tolerated = _ROUNDING * torch.finfo(model.dtype).eps * alone.abs().mean()
    if difference > torch.maximum(_LEAK * (mixed - alone).abs().mean(), tolerated):
        attention = getattr(model.config, "_attn_implementation", None)
        message = f"{type(model).__name__} with {attention} attention mixes the examples of a packed row"
        raise ConfigError(Problem(message, field, remedy="set packing: false"))


def _trial_ids(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two sequences of distinct ids, spread over the vocabulary."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    size = embedding.shape[0]
    spread = [(2 * i + 1) * size // (4 * _TRIAL_LENGTH) for i in range(2 * _TRIAL_LENGTH)]
    ids = torch.tensor(spread, device=model.device)
    return ids[::2], ids[1::2]


def _logits(model: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    return logits.float()
