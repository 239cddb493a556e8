"""How a worker waits for vLLM's next call while it loads a checkpoint.

For a second after each call vLLM looks for the next in a loop, and holds Python's lock while it does: on two cores a
load beside it has little more than one of them, and waits for the lock at each step in Python. So the loop pauses
between two looks until the load is over. A call is noticed half a millisecond later at most.

Tried and taken out: to have it sleep at once until vLLM's notice, as it does after an idle second. A notice is lost if
it comes right after one that nobody read, and vLLM looks again only after five seconds: streams beside loads stood
still for as long (benchmarks/results/ready-beside-lost-notice.json).
"""

from __future__ import annotations

import time
from concurrent.futures import Future

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

_PAUSE = 0.0005  # seconds
_loads: set[Future] = set()


def install() -> None:
    """In a worker, once."""
    wait = SpinCondition.wait

    def gently(condition: SpinCondition, timeout_ms: int | None = None) -> None:
        if _loads and time.monotonic() <= condition.last_read + condition.busy_loop_s:
            time.sleep(_PAUSE)
        else:
            wait(condition, timeout_ms)

    SpinCondition.wait = gently


def pause_until(load: Future) -> None:
    """Until it is done."""
    _loads.add(load)
    load.add_done_callback(_loads.discard)
