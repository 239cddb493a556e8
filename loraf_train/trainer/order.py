"""Which examples a step sees, and how processes divide them: the same ones, whatever the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from loraf.errors import ConfigError, Problem
from loraf_train.data.examples import Example


def derived_seed(*parts: object) -> int:
    """A seed below 2³² for each distinct sequence of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Order(torch.utils.data.Sampler[int]):
    """All indices once an epoch, in an order that depends on the seed and the epoch's number alone.

    Args:
        size: number of examples.
        multiple: the epoch is filled up to a multiple of this with the index `size` (see Filled).
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


class Filled(torch.utils.data.Dataset[Example]):
    """Examples, and behind the last a blank one without loss.

    Several processes take equal shares of a step, so the last step of an epoch may be too small for them. accelerate
    would fill it with examples that were seen already; a blank changes neither the loss nor a gradient.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int):
        self._examples = examples
        self._blank = Example([pad_id], prompt_length=1)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._blank if index == len(self._examples) else self._examples[index]


def split_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(examples a process takes at once, accumulation steps): their product times the processes is `batch_size`.

    Of the splits with at most `micro_batch_size` at once, the one with the fewest accumulation steps.

    Raises:
        ConfigError: the batch cannot be divided evenly over the processes.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        message = f"{batch_size} examples cannot be divided over {processes} processes"
        remedy = f"use a multiple of {processes}"
        raise ConfigError(Problem(message, "training.batch_size", remedy=remedy))
    fewest = -(-share // (micro_batch_size or share))
    steps = next(n for n in range(fewest, share + 1) if share % n == 0)
    return share // steps, steps
