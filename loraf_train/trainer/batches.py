"""Turns examples into batches, padded or packed, and says which example and place each token of a batch has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf_train.data.examples import IGNORED

if TYPE_CHECKING:
    from loraf_train.data.examples import Example
    from loraf_train.trainer.packing import PackingCollator

EXAMPLES, PLACES = "examples", "places"  # of a NumberedCollator's batch
_PADDING = -1  # the example of padding


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to one batch. Only completions have labels, and never position 0."""

    pad_id: int

    def rows(self, examples: Sequence[Example]) -> list[list[int]]:
        """Returns the indices of the examples in each row: one."""
        return [[i] for i in range(len(examples))]

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels, each (examples, longest) int64."""
        longest = max(len(e.input_ids) for e in examples)
        ids = [e.input_ids + [self.pad_id] * (longest - len(e.input_ids)) for e in examples]
        attention = [[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]
        labels = [e.labels() + [IGNORED] * (longest - len(e.input_ids)) for e in examples]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(attention),
            "labels": torch.tensor(labels),
        }


@dataclass(frozen=True)
class NumberedCollator:
    """Makes a collator's batches of numbered examples, with the number and the place of each token."""

    collator: Collator | PackingCollator

    def __call__(self, numbered: Sequence[tuple[int, Example]]) -> dict[str, torch.Tensor]:
        """Returns the collator's batch, EXAMPLES and PLACES, each (rows, width) int64."""
        examples = [example for _, example in numbered]
        batch = self.collator(examples)
        numbers = torch.full_like(batch["input_ids"], _PADDING)
        places = torch.zeros_like(numbers)
        for r, row in enumerate(self.collator.rows(examples)):
            begin = 0
            for i in row:
                end = begin + len(examples[i].input_ids)
                numbers[r, begin:end] = numbered[i][0]
                places[r, begin:end] = torch.arange(end - begin)
                begin = end
        return batch | {EXAMPLES: numbers, PLACES: places}
