"""Batches of any trainer: going round them, moving them, and the examples that are in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from loraf.errors import ConfigError, Problem
from loraf_train.data.examples import IGNORED, Example

Batch = Mapping[str, Any]
_FIELD = "dataloader"


def rounds(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yields `count` batches, from the beginning again where there are too few.

    Raises:
        ConfigError: there is no batch.
    """
    once = iter(batches) is batches  # a generator, which cannot be started again
    seen: list[Batch] = []
    done = 0
    while done < count:
        before = done
        for batch in seen if once and done else batches:
            if once and len(seen) == done:
                seen.append(batch)
            yield batch
            done += 1
            if done == count:
                return
        if done == before:
            raise ConfigError(Problem("has no batches", _FIELD, remedy="pass the task's training batches"))


def moved(batch: Any, device: torch.device) -> dict[str, Any]:
    """Returns the batch with its tensors on a device.

    Raises:
        ConfigError: it is not a mapping of the model's arguments.
    """
    if not isinstance(batch, Mapping):
        message = f"holds a {type(batch).__name__}, not a mapping such as {{'input_ids': …, 'labels': …}}"
        raise ConfigError(Problem(message, _FIELD, remedy="pass batches as the model takes them"))
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def labelled_tokens(batch: Batch) -> int:
    """Returns the number of tokens that the model's mean loss is over; 1 if the batch does not show it."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        return 1
    return int((labels[:, 1:] != IGNORED).sum())


def examples_of(batch: Batch) -> list[Example]:
    """Returns the examples in a batch: a row each, or each sequence of a packed row. Empty if it shows none.

    Of a batch of preferences, as TRL makes them, the chosen answers are taken: the first half of its rows.
    """
    ids, labelled = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return []
    if isinstance(labelled, torch.Tensor):
        learned = labelled != IGNORED
    elif isinstance(batch.get("completion_mask"), torch.Tensor):
        learned = batch["completion_mask"].bool()
        ids, learned = ids[: len(ids) // 2], learned[: len(ids) // 2]
    else:
        return []
    mask, places = batch.get("attention_mask"), batch.get("position_ids")
    examples = []
    for row in range(len(ids)):
        real = mask[row].bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else torch.ones_like(ids[row]) > 0
        tokens, learn = ids[row][real].tolist(), learned[row][real].tolist()
        starts = [0]
        if not isinstance(mask, torch.Tensor) and isinstance(places, torch.Tensor):
            starts = (places[row if len(places) > 1 else 0] == 0).nonzero().view(-1).tolist() or [0]
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if any(learn[begin + 1 : end]):
                examples.append(_example(tokens[begin:end], learn[begin:end]))
    return examples


def _example(tokens: list[int], learned: list[bool]) -> Example:
    """Makes the example whose labels are at the `learned` tokens, and nothing after the last of them."""
    last = max(i for i, is_learned in enumerate(learned) if is_learned)
    first = max(1, learned.index(True, 1))
    silent = []
    begin: int | None = None
    for i in range(first, last + 1):
        if not learned[i] and begin is None:
            begin = i
        elif learned[i] and begin is not None:
            silent.append((begin, i))
            begin = None
    return Example(tokens[: last + 1], first, tuple(silent))
