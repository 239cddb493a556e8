"""Prompts and answers through a transformers model: chunks of a prompt, and batches of answers, with their KV cache.

Rows of a batch end together: shorter ones are padded on the left, masked, and counted from their own first token.

    row 0   . . . p p p a a          p prompt, a answer, . padding (masked; its keys and values are zeros)
    row 1   p p p p p a a a
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loraf_serve.backends.answers import Answer

# Tokens of a prompt that go through the model at once. Between chunks a request can be cancelled.
CHUNK = 512


def unsupported_cache(config) -> str | None:
    """What a model keeps between tokens that is not keys and values (a recurrent state, say); None if nothing."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return ", ".join(sorted(kind.__name__ for kind in kinds)) or None


def lengths_interfere(config) -> bool:
    """Whether a long row of a batch changes its neighbours: rotary frequencies that follow the longest position."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {r.get("rope_type") for r in rope.values() if isinstance(r, dict)}
    return bool(kinds & {"dynamic", "longrope"})


class Forward:
    """Calls the model with what its `forward` takes."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._takes = inspect.signature(model.forward).parameters.keys()

    def __call__(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        positions: Sequence[Sequence[int]],
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits after the last token of each row: (rows, vocab). `cache` grows by the tokens.

        Args:
            tokens, positions: (rows, new tokens).
            mask: (rows, cached and new tokens), False at padding; None where there is none.
        """
        device = self._model.device
        arguments = {
            "input_ids": torch.tensor(tokens, device=device),
            "position_ids": torch.tensor(positions, device=device),
            "attention_mask": None if mask is None else mask.to(device),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        taken = {name: value for name, value in arguments.items() if name in self._takes}
        return self._model(**taken).logits[:, -1]


class Prefill:
    """A prompt on its way into a cache, a chunk at a time.

    Attributes:
        cache: keys and values of the tokens done. Every layer keeps all of them: a sliding window acts by the mask.
    """

    def __init__(self, prompt: Sequence[int]):
        self.cache = DynamicCache()
        self._prompt = prompt
        self._done = 0

    def step(self, forward: Forward) -> torch.Tensor | None:
        """Runs the next chunk. Returns the logits after the prompt, (vocab,), once it is through."""
        end = min(self._done + CHUNK, len(self._prompt))
        logits = forward([self._prompt[self._done : end]], self.cache, [range(self._done, end)])
        self._done = end
        return logits[0] if end == len(self._prompt) else None

    @property
    def next_chunk(self) -> int:
        """Tokens that the next step takes."""
        return min(CHUNK, len(self._prompt) - self._done)


class Batch:
    """Answers that are decoded together.

    Attributes:
        answers: one a row, unfinished.
    """

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._lengths: list[int] = []  # tokens of each row in the cache, padding not counted
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, answers: Sequence[Answer], cache: Cache, length: int) -> None:
        """Adds answers to one prompt.

        Args:
            cache: of one row, the prompt's; it is used up.
            length: tokens in it.
        """
        if not answers:
            return
        if len(answers) > 1:
            cache.batch_repeat_interleave(len(answers))
        self._cache = _stacked(self._cache, cache) if self.answers else cache
        self.answers += answers
        self._lengths += [length] * len(answers)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, and the padding that no row needs any more."""
        if len(rows) == len(self.answers):
            return
        self.answers = [self.answers[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache = DynamicCache()
            return
        indices = torch.tensor(rows, device=self._cache.layers[0].keys.device)
        longest = max(self._lengths)
        for layer in self._cache.layers:
            layer.keys = layer.keys[indices, :, -longest:]
            layer.values = layer.values[indices, :, -longest:]

    def step(self, forward: Forward) -> torch.Tensor:
        """Runs the last token of every answer; the logits after it, (rows, vocab)."""
        longest = max(self._lengths)
        mask = None
        if min(self._lengths) < longest:
            first = torch.tensor([longest - length for length in self._lengths])
            mask = torch.arange(longest + 1) >= first[:, None]
        tokens = [[answer.token_ids[-1]] for answer in self.answers]
        logits = forward(tokens, self._cache, [[length] for length in self._lengths], mask)
        self._lengths = [length + 1 for length in self._lengths]
        return logits


def _stacked(first: Cache, second: Cache) -> Cache:
    """One cache with the rows of both, the shorter one padded on the left."""
    length = max(first.get_seq_length(), second.get_seq_length())
    for mine, other in zip(first.layers, second.layers, strict=True):
        mine.keys = torch.cat([_padded(mine.keys, length), _padded(other.keys, length)])
        mine.values = torch.cat([_padded(mine.values, length), _padded(other.values, length)])
    return first


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """`states` (rows, heads, tokens, width) with zeros before them, `length` tokens long."""
    return pad(states, (0, 0, length - states.shape[-2], 0))
