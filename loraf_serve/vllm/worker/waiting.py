"""How a worker waits for vLLM's next call while it loads a checkpoint.

For a second after each call vLLM polls for the next one and holds the GIL while it does. On two cores a load then
gets little more than one of them, and waits for the GIL at each step in Python. So until the load is over, the poll
loop sleeps between two polls. A call is noticed at most half a millisecond later.

Tried and removed: sleeping until vLLM's notice right away, as vLLM does after an idle second. A notice that comes right
after an unread one is lost, and vLLM polls again only after five seconds: streams stood still for that long during
loads (benchmarks/results/ready-beside-lost-notice.json).
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

_PAUSE = 0.0005  # seconds
_loads: set[Future[Any]] = set()


def install() -> None:
    """Changes vLLM's wait loop in this process. Call it once."""
    wait = SpinCondition.wait

    def wait_gently(condition: SpinCondition, timeout_ms: int | None = None) -> None:
        if _loads and time.monotonic() <= condition.last_read + condition.busy_loop_s:
            time.sleep(_PAUSE)
        else:
            wait(condition, timeout_ms)

    wait_gently.stock = wait  # type: ignore[attr-defined]  # for relied_on
    SpinCondition.wait = wait_gently  # type: ignore[method-assign, assignment]  # on purpose


def pause_until(load: Future[Any]) -> None:
    """Lets the poll loop sleep between two polls until `load` is done."""
    _loads.add(load)
    load.add_done_callback(_loads.discard)
