"""Runs a transformers model on chunks of a prompt and on batches of answers, and manages their KV cache.

Rows of a batch are right-aligned: shorter ones are padded on the left and masked, and positions start at their first
token.

    row 0   . . . p p p a a          p prompt, a answer, . padding (masked; its keys and values are zeros)
    row 1   p p p p p a a a
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loraf_serve.backends.answer_state import AnswerState

CHUNK = 512  # prompt tokens per model call; a request can be cancelled between chunks
CHUNK_WITH_LOGITS = 64  # if the logits of every token are wanted, which take memory


def unsupported_cache(config: PreTrainedConfig) -> str | None:
    """Names the cache layers of a model that are not keys and values (for example a recurrent state), or None."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return ", ".join(sorted(kind.__name__ for kind in kinds)) or None


def lengths_interfere(config: PreTrainedConfig) -> bool:
    """Whether a long row of a batch changes other rows, because rotary frequencies depend on the longest position."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {r.get("rope_type") for r in rope.values() if isinstance(r, dict)}
    return bool(kinds & {"dynamic", "longrope"})


class Forward:
    """Calls a model with those arguments that its `forward` accepts."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters.keys()

    def __call__(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        positions: Sequence[Sequence[int]],
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the logits after the last token of each row, (rows, vocab). Appends the new tokens to `cache`.

        Args:
            tokens, positions: (rows, new tokens).
            mask: (rows, cached and new tokens), False at padding; None if there is no padding.
        """
        return self._logits(tokens, cache, positions, mask, 1)[:, -1]

    def every(self, tokens: Sequence[int], cache: Cache, positions: Sequence[int]) -> torch.Tensor:
        """Returns the logits after each token of one row, (new tokens, vocab). Appends them to `cache`."""
        return self._logits([tokens], cache, [positions], None, len(tokens))[0]

    def _logits(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        positions: Sequence[Sequence[int]],
        mask: torch.Tensor | None,
        keep: int,
    ) -> torch.Tensor:
        device = self._model.device
        arguments = {
            "input_ids": torch.tensor(tokens, device=device),
            "position_ids": torch.tensor(positions, device=device),
            "attention_mask": None if mask is None else mask.to(device),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        accepted = {name: value for name, value in arguments.items() if name in self._parameters}
        logits: torch.Tensor = self._model(**accepted).logits
        return logits


class Prefill:
    """Runs a prompt in chunks.

    Args:
        every: receives the logits after each token of a chunk, (tokens, vocab); None if nobody wants them.

    Attributes:
        cache: keys and values of the tokens so far. Every layer keeps all of them; a sliding window is applied by the
            mask.
    """

    def __init__(self, prompt: Sequence[int], every: Callable[[torch.Tensor], None] | None = None):
        self.cache = DynamicCache()
        self._prompt = prompt
        self._every = every
        self._chunk = CHUNK if every is None else CHUNK_WITH_LOGITS
        self._done = 0

    def step(self, forward: Forward) -> torch.Tensor | None:
        """Runs the next chunk. Returns the logits after the prompt, (vocab,), or None if chunks remain."""
        end = min(self._done + self._chunk, len(self._prompt))
        tokens, positions = self._prompt[self._done : end], range(self._done, end)
        if self._every is None:
            logits = forward([tokens], self.cache, [positions])[0]
        else:
            rows = forward.every(tokens, self.cache, positions)
            self._every(rows)
            logits = rows[-1]
        self._done = end
        return logits if end == len(self._prompt) else None

    @property
    def next_chunk(self) -> int:
        """Number of tokens in the next chunk."""
        return min(self._chunk, len(self._prompt) - self._done)


class Batch:
    """Answers that are decoded together.

    Attributes:
        answers: one per row; unfinished.
    """

    def __init__(self) -> None:
        self.answers: list[AnswerState] = []
        self._lengths: list[int] = []  # tokens of each row in the cache, without padding
        self._cache: Cache = DynamicCache()

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, answers: Sequence[AnswerState], cache: Cache, length: int) -> None:
        """Adds the answers to one prompt.

        Args:
            cache: the prompt's, with one row; it must not be used afterwards.
            length: number of tokens in it.
        """
        if not answers:
            return
        if len(answers) > 1:
            cache.batch_repeat_interleave(len(answers))
        self._cache = _stacked(self._cache, cache) if self.answers else cache
        self.answers += answers
        self._lengths += [length] * len(answers)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, and padding that no remaining row needs."""
        if len(rows) == len(self.answers):
            return
        self.answers = [self.answers[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache = DynamicCache()
            return
        longest = max(self._lengths)
        for layer, keys, values in cache_layers(self._cache):
            indices = torch.tensor(rows, device=keys.device)
            layer.keys = keys[indices, :, -longest:]
            layer.values = values[indices, :, -longest:]

    def step(self, forward: Forward) -> torch.Tensor:
        """Runs the last token of every answer. Returns the logits after it, (rows, vocab)."""
        longest = max(self._lengths)
        mask = None
        if min(self._lengths) < longest:
            first = torch.tensor([longest - length for length in self._lengths])
            mask = torch.arange(longest + 1) >= first[:, None]
        tokens = [[answer.token_ids[-1]] for answer in self.answers]
        logits = forward(tokens, self._cache, [[length] for length in self._lengths], mask)
        self._lengths = [length + 1 for length in self._lengths]
        return logits


def cache_layers(cache: Cache) -> Iterator[tuple[DynamicLayer, torch.Tensor, torch.Tensor]]:
    """Yields each layer with its keys and values, (rows, heads, tokens, width)."""
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # see unsupported_cache
        assert layer.keys is not None and layer.values is not None
        yield layer, layer.keys, layer.values


def _stacked(first: Cache, second: Cache) -> Cache:
    """Appends the rows of `second` to `first`; the shorter cache is padded on the left."""
    length = max(first.get_seq_length(), second.get_seq_length())
    for (layer, keys, values), (_, more_keys, more_values) in zip(
        cache_layers(first), cache_layers(second), strict=True
    ):
        layer.keys = torch.cat([_padded(keys, length), _padded(more_keys, length)])
        layer.values = torch.cat([_padded(values, length), _padded(more_values, length)])
    return first


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """Pads `states` (rows, heads, tokens, width) with zeros on the left to `length` tokens."""
    return pad(states, (0, 0, length - states.shape[-2], 0))
