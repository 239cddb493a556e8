"""While a worker loads, it sleeps between two polls for vLLM's next call. Afterwards it waits as vLLM does."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from loraf_serve.vllm.worker import waiting


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records what the condition does each time it waits."""
    actions: list[str] = []
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # restored at the end
    monkeypatch.setattr(waiting, "_loads", set())
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: actions.append("slept"))
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: actions.append("polled"))
    waiting.install()
    return actions


def condition(seconds_ago: float) -> SimpleNamespace:
    """Returns a reader whose last call came `seconds_ago`."""
    reader = SimpleNamespace(is_reader=True, busy_loop_s=1, last_read=waiting.time.monotonic() - seconds_ago, slept=[])
    reader.poller = SimpleNamespace(poll=lambda timeout: reader.slept.append(timeout) or ())
    reader.read_cancel_socket = reader.local_notify_socket = None
    return reader


def test_a_worker_sleeps_between_polls_while_it_loads(waits: list[str]) -> None:
    reader, first, second = condition(0.1), Future(), Future()
    SpinCondition.wait(reader, 7)
    waiting.pause_until(first)
    waiting.pause_until(second)
    SpinCondition.wait(reader, 7)
    first.set_result(None)
    SpinCondition.wait(reader, timeout_ms=7)
    second.set_exception(ValueError())
    SpinCondition.wait(reader)
    waiting.pause_until(second)  # it is over already
    SpinCondition.wait(reader)
    assert waits == ["polled", "slept", "slept", "polled", "polled"]
    assert not reader.slept


def test_after_an_idle_second_it_waits_as_vllm_does(waits: list[str]) -> None:
    reader = condition(1.5)
    waiting.pause_until(Future())
    SpinCondition.wait(reader, timeout_ms=7)
    assert (reader.slept, waits) == ([7], [])
