"""How a worker waits for vLLM's next call.

For a second after each it looks for the next in a loop, and holds Python's lock while it does. A load that the call
began would have less than a core of two for that second, and wait for the lock at each of its own steps. So it has the
worker sleep at once; the call that wakes it is noticed no later than one after an idle second.
"""

from __future__ import annotations

import weakref

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

_waiting: weakref.WeakSet[SpinCondition] = weakref.WeakSet()


def watch() -> None:
    """In a worker, before it makes its queues: from now on they are known here."""
    make = SpinCondition.__init__

    def made(condition: SpinCondition, *args, **kwargs) -> None:
        make(condition, *args, **kwargs)
        _waiting.add(condition)

    SpinCondition.__init__ = made


def sleep_at_once() -> None:
    """The next wait of this worker is no loop, unless a call is there already."""
    for condition in _waiting:
        condition.last_read = float("-inf")
