"""A minimal service for test_processes.py. Usage: python -m tests.loraf_serve.engine_process MODEL

Starts the slots backend, ignores SIGTERM and SIGINT like a service that drains, answers one long request to the base
model, and prints its progress, one word per line. Then it waits to be killed.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import GenerationRequest, Sampling
from loraf_serve.vllm.engine.backends import SlotsBackend
from tests.loraf_serve.vllm_engines import OPTIONS


async def main(model: Path) -> None:
    backend = SlotsBackend(model, OPTIONS, 16)
    await backend.start()
    sampling = Sampling(max_tokens=400, ignore_eos=True)
    reason = None
    async for output in backend.generate(GenerationRequest("r", (1, 5), sampling, None, TaskSet())):
        if reason is None:
            say("answering")
        reason = output.choices[0].finish_reason or "unfinished"
    say(reason)
    await asyncio.sleep(600)


def say(word: str | None) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(main(Path(sys.argv[1])))
