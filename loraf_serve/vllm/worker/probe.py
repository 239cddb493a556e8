"""The service's part of a proof (`loraf_serve.vllm.worker.proof`): runs the forward passes that workers record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from loraf_serve.vllm.worker.calls import DECODE, MIXED, PREFILL
from loraf_serve.vllm.worker.remote import CallWorkers

Generate = Callable[[list[int], int], AsyncIterator[object]]  # prompt, new tokens → one output for each step

AT_ONCE = 1 << 40  # weights to compare in one call before anything is served
IN_SLICES = 1 << 24  # while requests run: some ten milliseconds, as long as a step of a small model
_TRIES = 3


async def prove_layers(call: CallWorkers, generate: Generate, token: int, max_model_len: int, elements: int) -> None:
    """Has every worker prove what it can about its layers.

    Args:
        generate: runs a request of the base model.
        token: any token id of the model.
        elements: AT_ONCE or IN_SLICES.
    """
    await call("loraf_begin_proof")
    try:
        for _ in range(_TRIES):
            await _all_kinds_of_steps(generate, token, max_model_len)
            if all({PREFILL, DECODE, MIXED} <= set(kinds) for kinds in await call("loraf_recorded")):
                break
    finally:
        await call("loraf_end_recording")
    while not all(await call("loraf_compare", elements)):
        pass


async def _all_kinds_of_steps(generate: Generate, token: int, max_model_len: int) -> None:
    """Runs one request, and a second that begins while the first one continues."""
    length = max(1, min(3, max_model_len - 1))
    tokens = max(1, min(8, max_model_len - length))
    first = generate([token] * length, tokens)
    second: asyncio.Task[None] | None = None
    async for _ in first:
        if second is None:
            second = asyncio.ensure_future(_exhaust(generate([token] * length, 1)))
    if second is not None:
        await second


async def _exhaust(outputs: AsyncIterator[object]) -> None:
    async for _ in outputs:
        pass
