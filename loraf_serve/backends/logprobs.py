"""Log-probabilities of tokens, before penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loraf_serve.backends.backend import PositionLogprobs, TokenLogprob
from loraf_serve.backends.detokenize import CONTEXT, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def position_logprobs(
    tokenizer: PreTrainedTokenizerBase, logits: torch.Tensor, token: int, count: int, before: Sequence[int]
) -> PositionLogprobs:
    """The log-probability of `token` and the `count` largest.

    Args:
        logits: (vocab,).
        before: the tokens before it.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))

    def entry(token: int, logprob: float, rank: int) -> TokenLogprob:
        return TokenLogprob(token, logprob, rank, token_text(tokenizer, before, token))

    top = zip(ids.tolist(), values.tolist(), range(1, len(ids) + 1), strict=True)
    chosen = entry(token, float(logprobs[token]), rank_of(logprobs, token))
    return PositionLogprobs(chosen, tuple(entry(*each) for each in top))


def rank_of(logprobs: torch.Tensor, token: int) -> int:
    """The number of tokens that are at least as likely, including `token` itself. `logprobs`: (vocab,)."""
    return int((logprobs >= logprobs[token]).sum())


class PromptLogprobs:
    """The log-probabilities of a prompt, gathered chunk by chunk.

    Attributes:
        positions: one entry per token so far; None for the first, which nothing precedes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], count: int):
        self.positions: list[PositionLogprobs | None] = [None]
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._count = count

    def add(self, logits: torch.Tensor) -> None:
        """Adds the next chunk. `logits`: (tokens, vocab), each row after its token."""
        for row in logits:
            place = len(self.positions)
            if place < len(self._prompt):
                before = self._prompt[max(0, place - CONTEXT) : place]
                token = self._prompt[place]
                self.positions.append(position_logprobs(self._tokenizer, row, token, self._count, before))
