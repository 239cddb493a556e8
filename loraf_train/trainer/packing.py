"""Several examples in one row, each as if it were alone: block-diagonal attention, positions from 0 for each.

    row          a a a a | b b b | c c c c c | pad pad
    positions    0 1 2 3 | 0 1 2 | 0 1 2 3 4 | 0   1

transformers (5.19, `masking_utils.find_packed_sequence_indices`) takes a position that does not follow the one before
as the begin of another sequence and lets attention see its own sequence only, within a sliding window too; that needs
position_ids, no attention_mask and no cache. Whether a model obeys is tried out before training (`require_separate`).

A step sees the same examples and divides by the same number of tokens as without packing, so its gradient is the same
but for rounding (and for dropout, which is drawn for each row).
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

_TRIAL_LENGTH = 8  # tokens of each of the trial's sequences
_LEAK = 0.1  # share of the effect of a full leak that counts as one
_ROUNDING = 4  # units of relative precision that sums in another order may differ by


@dataclass(frozen=True)
class PackingCollator:
    """Examples to rows of at most `row_length` tokens; an example that is longer has a row of its own."""

    pad_id: int
    row_length: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels, each (rows, longest) int64."""
        rows = first_fit([len(e.input_ids) for e in examples], self.row_length)
        width = max(sum(len(examples[i].input_ids) for i in row) for row in rows)
        ids, places, labels = [], [], []
        for row in rows:
            chosen = [examples[i] for i in row]
            rest = width - sum(len(e.input_ids) for e in chosen)
            ids.append([token for e in chosen for token in e.input_ids] + [self.pad_id] * rest)
            lengths = [*(len(e.input_ids) for e in chosen), rest]
            places.append([place for length in lengths for place in range(length)])
            labels.append([label for e in chosen for label in e.labels()] + [IGNORED] * rest)
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(places),
            "labels": torch.tensor(labels),
        }


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices by row: each goes, in order, into the first row that has room for it. Depends on nothing else."""
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
    """Tries two sequences in each of two rows: what the model says to the second must not depend on the first.

    The yardstick is the second sequence alone, and the effect that the first has where it is seen.

    Raises:
        ConfigError: the model mixes the sequences of a row (attention that builds no mask from positions, a recurrent
            state), or cannot take position_ids.
    """
    was_training = model.training
    model.eval()
    try:
        first, second = _trial_ids(model)
        places = torch.arange(2 * _TRIAL_LENGTH, device=model.device)
        pair = torch.stack([torch.cat([first, second]), torch.cat([second, second])])
        alone = _logits(model, second[None], places[None, :_TRIAL_LENGTH])[0]
        packed = _logits(model, pair, (places % _TRIAL_LENGTH).expand(2, -1))[:, _TRIAL_LENGTH:]
        mixed = _logits(model, pair, places.expand(2, -1))[:, _TRIAL_LENGTH:]
    except TypeError as error:
        message = f"the model takes no position_ids ({error})"
        raise ConfigError(Problem(message, field, remedy="set packing: false")) from None
    finally:
        model.train(was_training)
    found = (packed - alone).abs().mean()
    tolerated = _ROUNDING * torch.finfo(model.dtype).eps * alone.abs().mean()
    if found > torch.maximum(_LEAK * (mixed - alone).abs().mean(), tolerated):
        attention = getattr(model.config, "_attn_implementation", None)
        message = f"{type(model).__name__} with {attention} attention mixes the examples of a packed row"
        raise ConfigError(Problem(message, field, remedy="set packing: false"))


def _trial_ids(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of distinct ids from all over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    spread = [(2 * i + 1) * size // (4 * _TRIAL_LENGTH) for i in range(2 * _TRIAL_LENGTH)]
    ids = torch.tensor(spread, device=model.device)
    return ids[::2], ids[1::2]


def _logits(model: PreTrainedModel, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
