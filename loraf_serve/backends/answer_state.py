"""The state of one answer while it is generated: tokens, text, log-probabilities, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf_serve.backends.backend import ChoiceDelta, GenerationRequest
from loraf_serve.backends.bad_words import token_sequences
from loraf_serve.backends.detokenize import StopTexts, TextStream
from loraf_serve.backends.logprobs import position_logprobs
from loraf_serve.backends.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DecodingConfig:
    """Properties of the model that every answer needs.

    Attributes:
        tokenizer: a fast one; used only by the thread that decodes.
        eos: the tokenizer's end-of-sequence token. An answer that it ends has no stop reason.
        more_eos: further end-of-sequence tokens of the generation config. They act as stop tokens, as in vLLM.
        max_model_len: limit on prompt and answer together, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: int | None
    more_eos: frozenset[int]
    max_model_len: int


class AnswerState:
    """One of the `n` answers to a request.

    Attributes:
        token_ids: the tokens so far, including the one that ended the answer.
        finished: the answer is complete or cancelled.
    """

    def __init__(self, request: GenerationRequest, index: int, config: DecodingConfig):
        sampling = request.sampling
        self.index = index
        self.token_ids: list[int] = []
        self.finished = False
        self._config = config
        self._sampling = sampling
        ends = set(config.more_eos) | ({config.eos} if config.eos is not None else set())
        self._stop_tokens = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else config.more_eos
        )
        self._eos = None if sampling.ignore_eos else config.eos
        excluded = [ids for word in sampling.bad_words for ids in token_sequences(config.tokenizer, word)]
        self._sampler = Sampler(
            sampling, request.prompt_token_ids, ends.union(sampling.stop_token_ids), index, excluded
        )
        self._text = TextStream(config.tokenizer, request.prompt_token_ids, sampling.skip_special_tokens)
        self._stops = StopTexts(sampling.stop)
        self._limit = longest_answer(request, config.max_model_len)

    def accept(self, logits: torch.Tensor) -> ChoiceDelta:
        """Samples the next token and returns what it adds to the answer.

        Args:
            logits: (vocab,) of the position after the last token.
        """
        token = self._sampler(logits, self.token_ids)
        count = self._sampling.logprobs
        logprobs = (
            () if count is None else (position_logprobs(self._config.tokenizer, logits, token, count, self.token_ids),)
        )
        self.token_ids.append(token)
        finish, reason, text = self._ended_by(token)
        if finish == "stop":  # the token that ends the answer has no text
            text = self._stops.flush()
        else:
            text = self._stops.add(self._text.add(token), len(self.token_ids) > self._sampling.min_tokens)
            if self._stops.matched is not None:
                finish, reason = "stop", self._stops.matched
            elif finish:
                text += self._stops.flush()
        self.finished = finish is not None
        return ChoiceDelta(self.index, text, (token,), finish, reason, logprobs)

    def _ended_by(self, token: int) -> tuple[str | None, str, str]:
        """(finish reason, stop reason, text); the finish reason is None if the token does not end the answer."""
        if token == self._eos:
            return "stop", "", ""
        if token in self._stop_tokens:
            return "stop", str(token), ""
        return ("length" if len(self.token_ids) >= self._limit else None), "", ""


def longest_answer(request: GenerationRequest, max_model_len: int) -> int:
    """Maximum number of tokens in an answer to the request."""
    return min(request.sampling.max_tokens, max_model_len - len(request.prompt_token_ids))
