"""From a row of logits to a token, as vLLM's sampler does it (vllm/v1/sample/sampler.py), for one answer.

    logits ─▶ min_tokens ─▶ logit_bias ─▶ penalties ─┬─▶ argmax                                        (greedy)
                                                      └─▶ temperature ─▶ min_p ─▶ top_k ─▶ top_p ─▶ draw

Log-probabilities are those of the logits as the model gave them, before any of this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraf_serve.backends.backend import Sampling

# vLLM takes a temperature below the first for greedy, and raises one below the second to it (_SAMPLING_EPS, _MAX_TEMP).
GREEDY_BELOW = 1e-5
COLDEST = 1e-2


class Sampler:
    """Chooses the tokens of one answer.

    Noise comes from a generator of this answer's own, on the CPU: a seed gives the same answer whatever else runs and
    on whatever device the model is.

    Args:
        prompt: the prompt's token ids.
        stopping: ids that min_tokens holds off: end-of-sequence and stop tokens.
        index: which of the request's answers this is; its seed is `sampling.seed + index`, as in vLLM.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], stopping: Collection[int], index: int = 0):
        self._sampling = sampling
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
            logits: (vocab,), any float dtype; left as they are.
            output: the answer's token ids so far.
        """
        scores = self.scores(logits, output)
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))

    def scores(self, logits: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        """What is drawn from, or has its largest taken: float32 (vocab,), -inf at what cannot be chosen."""
        scores = logits.to(torch.float32, copy=True)
        if len(output) < self._sampling.min_tokens:
            scores[self._stopping] = -torch.inf
        add_bias(scores, self._sampling.logit_bias)
        scores = penalize(scores, self._prompt, output, self._sampling)
        return scores if self._greedy else self._warpers(None, scores[None])[0]


def add_bias(scores: torch.Tensor, bias: Mapping[int, float]) -> None:
    """Adds `bias` (token id → addend) to `scores` (vocab,) in place."""
    if bias:
        scores[list(bias)] += torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)


def penalize(scores: torch.Tensor, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Repetition over prompt and output, then frequency and presence over the output alone (vllm `apply_penalties`).

    Args:
        scores: float32 (vocab,).

    Returns:
        `scores` itself if there is nothing to do.
    """
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor([[*prompt, *output]], device=scores.device)
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores[None])[0]
    if output and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = torch.tensor(output, device=scores.device).unique(return_counts=True)
        scores[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return scores


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """What stands between the penalties and the draw, in vLLM's order. Empty where everything is off."""
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


def rank_of(logprobs: torch.Tensor, token: int) -> int:
    """How many tokens are at least as likely, itself included: 1 for the most likely. `logprobs`: (vocab,)."""
    return int((logprobs >= logprobs[token]).sum())
