"""Keeps the seeds of requests whose prompt is computed in several steps, on the CPU.

Each such step draws a token that is thrown away. vLLM then sets the request's generator back by the draw, in a way
that only generators on a GPU know: on the CPU it raises, and the engine ends for everybody. Here such a step does not
use the request's generator in the first place.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from vllm.platforms import current_platform


def install() -> None:
    """Replaces `sample_tokens` of vLLM's model runner for the CPU. No-op on other platforms."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        # vLLM has no setting for it, hence the ignore.
        CPUModelRunner.sample_tokens = without_draws_to_discard(CPUModelRunner.sample_tokens)  # type: ignore[method-assign]


def without_draws_to_discard(sample_tokens: Any) -> Any:
    """Wraps `sample_tokens` so that requests whose token is discarded have no generator during the call."""

    @functools.wraps(sample_tokens)
    def sample(runner: Any, *arguments: Any, **named: Any) -> Any:
        batch = runner.input_batch
        discarded = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        # The sampler reads the same dictionary.
        aside = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
        try:
            return sample_tokens(runner, *arguments, **named)
        finally:
            batch.generators.update(aside)

    return sample
