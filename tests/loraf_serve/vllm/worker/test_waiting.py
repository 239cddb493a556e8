"""A worker that loads pauses between two looks for vLLM's next call, and does as vLLM does when the load is over."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from loraf_serve.vllm.worker import waiting


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a condition did each time it waited."""
    done: list[str] = []
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # put back at the end
    monkeypatch.setattr(waiting, "_loads", set())
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: done.append("paused"))
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: done.append("looked again"))
    waiting.install()
    return done


def condition(seconds_ago: float) -> SimpleNamespace:
    """A reader whose last call came so long ago."""
    made = SimpleNamespace(is_reader=True, busy_loop_s=1, last_read=waiting.time.monotonic() - seconds_ago, slept=[])
    made.poller = SimpleNamespace(poll=lambda timeout: made.slept.append(timeout) or ())
    made.read_cancel_socket = made.local_notify_socket = None
    return made


def test_pauses_while_something_loads(waits: list[str]) -> None:
    reader, first, second = condition(0.1), Future(), Future()
    SpinCondition.wait(reader, 7)
    waiting.pause_until(first)
    waiting.pause_until(second)
    SpinCondition.wait(reader, 7)
    first.set_result(None)
    SpinCondition.wait(reader, timeout_ms=7)
    second.set_exception(ValueError())
    SpinCondition.wait(reader)
    waiting.pause_until(second)  # over already
    SpinCondition.wait(reader)
    assert waits == ["looked again", "paused", "paused", "looked again", "looked again"]
    assert not reader.slept


def test_after_a_second_it_sleeps_as_ever(waits: list[str]) -> None:
    reader = condition(1.5)
    waiting.pause_until(Future())
    SpinCondition.wait(reader, timeout_ms=7)
    assert (reader.slept, waits) == ([7], [])
