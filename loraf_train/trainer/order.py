"""Which examples a step sees, and how processes share them. The examples do not depend on the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loraf.errors import ConfigError, Problem
from loraf_train.data.examples import Example


def derived_seed(*parts: object) -> int:
    """Returns a seed below 2³² that depends on every part and on their order."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class EpochOrder(torch.utils.data.Sampler[int]):
    """Yields all indices once an epoch, in an order that depends only on the seed and the epoch's number.

    Args:
        size: number of examples.
        multiple: the epoch is padded to a multiple of this with the index `size`, see BlankPadded.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1):
        self._size = size
        self._seed = seed
        self._blanks = -size % multiple
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size + self._blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed("order", self._seed, self._epoch))
        return iter(torch.randperm(self._size, generator=generator).tolist() + [self._size] * self._blanks)


class GivenOrder(EpochOrder):
    """Yields all indices once, in the examples' own order, without holding them in memory."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


class BlankPadded(torch.utils.data.Dataset[tuple[int, Any]]):
    """Examples with their numbers, followed by one blank example without labels at the index after the last.

    Processes take equal shares of a step, so the last step of an epoch may have too few examples for all of them.
    accelerate would repeat examples of the epoch; a blank changes neither the loss nor a gradient.

    Args:
        in_order: they can only be read in their own order.
        blank: in place of a blank example, where they are something else.
    """

    def __init__(self, examples: Sequence[Any], pad_id: int, in_order: bool = False, blank: Any = None):
        self._examples = examples
        self.in_order = in_order
        self._blank = Example([pad_id], prompt_length=1) if blank is None else blank

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """Returns (index, example): the number tells dropout which example it is, however the batch is cut."""
        return index, self._blank if index == len(self._examples) else self._examples[index]


def split_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """Splits a step's batch over processes and gradient accumulation.

    Returns:
        Examples per forward pass of a process, and accumulation steps; their product times the number of processes is
        `batch_size`. Of the splits with up to `micro_batch_size` examples, the one with the fewest accumulation steps.

    Raises:
        ConfigError: `batch_size` is not a multiple of the number of processes.
    """
    share, remainder = divmod(batch_size, processes)
    if remainder:
        message = f"{batch_size} examples cannot be divided over {processes} processes"
        remedy = f"use a multiple of {processes}"
        raise ConfigError(Problem(message, "training.batch_size", remedy=remedy))
    fewest = -(-share // (micro_batch_size or share))
    steps = next(n for n in range(fewest, share + 1) if share % n == 0)
    return share // steps, steps
