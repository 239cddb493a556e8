"""The slot queue: never more sets than slots, no set starves, and cancelled requests leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import wraps

import pytest

from loraf_serve.vllm.engine.slot_queue import SlotAdmission


def on_a_loop(test: Callable[..., Coroutine]) -> Callable[..., None]:
    @wraps(test)
    def run(*args, **kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Request:
    """Holds its set's slot from `start` to `finish`."""

    def __init__(self, slots: SlotAdmission, key: str, priority: int = 0):
        self.admitted = False
        self._end = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(slots, key, priority))

    async def _run(self, slots: SlotAdmission, key: str, priority: int) -> None:
        async with slots.slot(key, priority):
            self.admitted = True
            await self._end.wait()

    async def finish(self) -> None:
        self._end.set()
        await self.task
        await settle()

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await settle()


@on_a_loop
async def test_requests_of_an_admitted_set_share_its_slot() -> None:
    slots = SlotAdmission(1)
    requests = [Request(slots, "a") for _ in range(3)]
    await settle()
    assert all(request.admitted for request in requests)
    for request in requests:
        await request.finish()
    assert not slots.admitted


@on_a_loop
async def test_a_waiting_set_gets_its_turn_under_a_steady_stream_for_another() -> None:
    slots = SlotAdmission(1)
    first = Request(slots, "busy")
    await settle()
    other = Request(slots, "other")
    await settle()
    stream = [Request(slots, "busy") for _ in range(5)]
    await settle()
    assert not any(request.admitted for request in [other, *stream])  # "busy" is closed
    await first.finish()
    assert other.admitted and not any(request.admitted for request in stream)
    await other.finish()
    assert all(request.admitted for request in stream)
    for request in stream:
        await request.finish()


@on_a_loop
async def test_sets_get_slots_in_the_order_in_which_they_began_to_wait() -> None:
    slots = SlotAdmission(1)
    running = Request(slots, "0")
    await settle()
    waiting = {key: Request(slots, key) for key in "4213"}
    await settle()
    for request in waiting.values():
        await running.finish()
        assert request.admitted
        running = request
    await running.finish()


@on_a_loop
async def test_only_as_many_sets_are_closed_as_wait() -> None:
    slots = SlotAdmission(3)
    running = {key: [Request(slots, key)] for key in "abc"}
    running["a"].append(Request(slots, "a"))
    running["b"].append(Request(slots, "b"))
    await settle()
    waiting = Request(slots, "d")  # closes "c", which has fewest requests
    await settle()
    late = {key: Request(slots, key) for key in "abc"}
    await settle()
    assert {key for key, request in late.items() if request.admitted} == {"a", "b"}
    await waiting.cancel()  # no set waits for the slot any more
    assert late["c"].admitted
    for request in [*running["a"], *running["b"], *running["c"], *late.values()]:
        await request.finish()
    assert not slots.admitted


@on_a_loop
async def test_a_request_cancelled_while_it_is_admitted_gives_the_slot_back() -> None:
    slots = SlotAdmission(1)
    running = Request(slots, "a")
    await settle()
    waiting = [Request(slots, "b"), Request(slots, "c")]
    await settle()
    running._end.set()
    await asyncio.sleep(0)  # the slot is about to go to "b", whose task has not run yet
    await waiting[0].cancel()
    assert waiting[1].admitted
    await waiting[1].finish()
    assert not slots.admitted


@on_a_loop
async def test_waiting_requests_fail_when_the_backend_stops() -> None:
    slots = SlotAdmission(1)
    running = Request(slots, "a")
    await settle()
    waiting = Request(slots, "b")
    await settle()
    slots.end(RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        await waiting.task
    with pytest.raises(RuntimeError, match="stopped"):
        await Request(slots, "a").task
    await running.finish()
    assert not slots.admitted


@pytest.mark.parametrize("seed", range(20))
@on_a_loop
async def test_random_traffic(seed: int) -> None:
    """Random arrivals, ends and cancellations: never too many sets, and every request that stays is served."""
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    slots = SlotAdmission(count)
    running: Counter[str] = Counter()
    served = 0

    async def request(key: str) -> None:
        nonlocal served
        async with slots.slot(key):
            running[key] += 1
            assert len(+running) <= count
            try:
                for _ in range(rng.randint(0, 5)):
                    await asyncio.sleep(0)
            finally:
                running[key] -= 1
        served += 1

    tasks, cancelled = [], 0
    for _ in range(200):
        tasks.append(asyncio.ensure_future(request(rng.choice("abcdefgh"))))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert [o for o in outcomes if o is not None and not isinstance(o, asyncio.CancelledError)] == []
    assert served + cancelled == len(tasks) and served > 0
    assert not slots.admitted and not slots._waiting and not slots._closed


@on_a_loop
async def test_a_set_with_a_lower_priority_number_gets_the_next_slot() -> None:
    slots = SlotAdmission(1)
    running = Request(slots, "a")
    await settle()
    waiting = {key: Request(slots, key, priority) for key, priority in (("b", 0), ("c", 5), ("d", -1), ("e", 0))}
    await settle()
    order = []
    while len(order) < len(waiting):
        await (waiting[order[-1]] if order else running).finish()
        (admitted,) = [key for key, request in waiting.items() if request.admitted and key not in order]
        order.append(admitted)
    assert order == ["d", "b", "e", "c"]
    await waiting["c"].finish()


@on_a_loop
async def test_one_request_of_a_set_brings_the_others_forward() -> None:
    slots = SlotAdmission(1)
    running = Request(slots, "a")
    first, late, urgent = (Request(slots, key, priority) for key, priority in (("b", 0), ("c", 0), ("c", -1)))
    await settle()
    await running.finish()
    assert (first.admitted, late.admitted, urgent.admitted) == (False, True, True)
    await urgent.cancel()
    await late.finish()
    assert first.admitted
    await first.finish()
