"""Samples a token from a row of logits as vLLM's sampler does (vllm/v1/sample/sampler.py), for one answer.

    logits ─▶ bad_words ─▶ min_tokens ─▶ logit_bias ─▶ penalties ─┬─▶ argmax                              (greedy)
                                                                  └─▶ temperature ─▶ min_p ─▶ top_k ─▶ top_p ─▶ draw

Log-probabilities are computed from the unmodified logits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraf_serve.backends import bad_words
from loraf_serve.backends.backend import Sampling

# vLLM treats a temperature below the first as greedy, and raises one below the second to it (_SAMPLING_EPS, _MAX_TEMP).
GREEDY_BELOW = 1e-5
COLDEST = 1e-2
_NO_IDS = cast(torch.LongTensor, None)  # the warpers below ignore the token ids


class Sampler:
    """Samples the tokens of one answer.

    Each answer has its own random generator on the CPU, so a seed gives the same answer on every device, regardless
    of what else runs.

    Args:
        prompt: the prompt's token ids.
        stopping: ids that min_tokens suppresses: end-of-sequence and stop tokens.
        index: which of the request's answers this is; its seed is `sampling.seed + index`, as in vLLM.
        excluded: bad words as sequences of tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stopping: Collection[int],
        index: int = 0,
        excluded: Sequence[Sequence[int]] = (),
    ):
        self._sampling = sampling
        self._excluded = excluded
        self._prompt = prompt
        self._stopping = sorted(stopping)
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._warpers = warpers(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + index)

    def __call__(self, logits: torch.Tensor, output: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: (vocab,), any float dtype; not modified.
            output: the answer's token ids so far.
        """
        scores = self.scores(logits, output)
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))

    def scores(self, logits: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        """The logits after all steps but the last, float32 (vocab,), -inf for excluded tokens. Arguments as above."""
        scores = logits.to(torch.float32, copy=True)
        scores[bad_words.excluded(self._excluded, output)] = -torch.inf
        if len(output) < self._sampling.min_tokens:
            scores[self._stopping] = -torch.inf
        add_bias(scores, self._sampling.logit_bias)
        scores = penalize(scores, self._prompt, output, self._sampling)
        return scores if self._greedy else self._warpers(_NO_IDS, cast(torch.FloatTensor, scores[None]))[0]


def add_bias(scores: torch.Tensor, bias: Mapping[int, float]) -> None:
    """Adds `bias` (token id → addend) to `scores` (vocab,) in place."""
    if bias:
        scores[list(bias)] += torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)


def penalize(scores: torch.Tensor, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Applies the repetition penalty to tokens of prompt and output, then the other two to tokens of the output.

    Same as vLLM's `apply_penalties`.

    Args:
        scores: float32 (vocab,).

    Returns:
        `scores` itself if there is no penalty.
    """
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor([[*prompt, *output]], device=scores.device)
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores[None])[0]
    if output and (sampling.frequency_penalty or sampling.presence_penalty):
        tokens = torch.tensor(output, device=scores.device)
        ids, counts = torch.unique(tokens, return_counts=True)
        scores[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return scores


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """The steps from temperature to top_p, in vLLM's order. Empty if all are off."""
    chain = LogitsProcessorList()
    if GREEDY_BELOW <= sampling.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(max(sampling.temperature, COLDEST)))
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain
