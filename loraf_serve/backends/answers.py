"""One answer as it grows: its tokens, its text, its log-probabilities, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf_serve.backends.backend import ChoiceDelta, GenerationRequest, PositionLogprobs, TokenLogprob
from loraf_serve.backends.detokenize import StopTexts, TextStream, token_text
from loraf_serve.backends.sampler import Sampler, rank_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFacts:
    """What an answer needs to know of the model.

    Attributes:
        tokenizer: fast; used by the thread that decodes and by no other.
        eos: the tokenizer's end-of-sequence token; an answer that it ends has no stop reason.
        more_eos: what the generation config names beside it; they end an answer as stop tokens do. As in vLLM.
        max_model_len: tokens of prompt and answer together.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: int | None
    more_eos: frozenset[int]
    max_model_len: int


class Answer:
    """One of the `n` answers to a request.

    Attributes:
        token_ids: so far, the one that ended it included.
        finished: no further token is wanted.
    """

    def __init__(self, request: GenerationRequest, index: int, facts: ModelFacts):
        sampling = request.sampling
        self.index = index
        self.token_ids: list[int] = []
        self.finished = False
        self._facts = facts
        self._sampling = sampling
        ends = set(facts.more_eos) | ({facts.eos} if facts.eos is not None else set())
        self._stop_tokens = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else facts.more_eos
        )
        self._eos = None if sampling.ignore_eos else facts.eos
        self._sampler = Sampler(sampling, request.prompt_token_ids, ends.union(sampling.stop_token_ids), index)
        self._text = TextStream(facts.tokenizer, request.prompt_token_ids, sampling.skip_special_tokens)
        self._stops = StopTexts(sampling.stop)
        self._most = longest_answer(request, facts.max_model_len)

    def accept(self, logits: torch.Tensor) -> ChoiceDelta:
        """Chooses the next token and returns what it adds.

        Args:
            logits: (vocab,) of the position after the last token.
        """
        token = self._sampler(logits, self.token_ids)
        logprobs = () if self._sampling.logprobs is None else (self._logprobs(logits, token),)
        self.token_ids.append(token)
        finish, reason, text = self._ended_by(token)
        if finish == "stop":  # the token that ended it has no text
            text = self._stops.flush()
        else:
            text = self._stops.add(self._text.add(token), len(self.token_ids) > self._sampling.min_tokens)
            if self._stops.found is not None:
                finish, reason = "stop", self._stops.found
            elif finish:
                text += self._stops.flush()
        self.finished = finish is not None
        return ChoiceDelta(self.index, text, (token,), finish, reason, logprobs)

    def _ended_by(self, token: int) -> tuple[str | None, str, str]:
        if token == self._eos:
            return "stop", "", ""
        if token in self._stop_tokens:
            return "stop", str(token), ""
        return ("length" if len(self.token_ids) >= self._most else None), "", ""

    def _logprobs(self, logits: torch.Tensor, token: int) -> PositionLogprobs:
        """Of the logits before any penalty or temperature; `token` is not yet in `token_ids`."""
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))

        def entry(token: int, logprob: float, rank: int) -> TokenLogprob:
            return TokenLogprob(token, logprob, rank, token_text(self._facts.tokenizer, self.token_ids, token))

        top = zip(ids.tolist(), values.tolist(), range(1, len(ids) + 1), strict=True)
        chosen = entry(token, float(logprobs[token]), rank_of(logprobs, token))
        return PositionLogprobs(chosen, tuple(entry(*each) for each in top))


def longest_answer(request: GenerationRequest, max_model_len: int) -> int:
    """Tokens that an answer to the request can have at most."""
    return min(request.sampling.max_tokens, max_model_len - len(request.prompt_token_ids))
