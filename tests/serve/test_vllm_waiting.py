"""A worker that has begun a load sleeps until vLLM's next call, instead of looking for it in a loop for a second."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.utils.network_utils import get_open_zmq_ipc_path

from loraf_serve.vllm import waiting


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SpinCondition, SpinCondition]]:
    """A writer's and a reader's end, made while LoRAF watches."""
    monkeypatch.setattr(SpinCondition, "__init__", SpinCondition.__init__)  # put back at the end
    monkeypatch.setattr(waiting, "_waiting", weakref.WeakSet())
    waiting.watch()
    with zmq.Context() as context:
        address = get_open_zmq_ipc_path()
        ends = SpinCondition(False, context, address), SpinCondition(True, context, address)
        yield ends
        for end in ends:
            for socket in (end.local_notify_socket, end.write_cancel_socket, end.read_cancel_socket):
                if socket is not None:
                    socket.close(linger=0)


def sleeps(reader: SpinCondition) -> bool:
    """Whether it waits for a notice; else it has come back at once, to look again."""
    asked = []
    poll = reader.poller.poll
    reader.poller.poll = lambda timeout: (asked.append(timeout), poll(timeout))[1]
    reader.wait(timeout_ms=1)
    del reader.poller.poll
    return bool(asked)


def test_the_next_wait_is_no_loop(pair) -> None:
    _, reader = pair
    reader.record_read()
    assert not sleeps(reader)  # vLLM's own way
    waiting.sleep_at_once()
    assert sleeps(reader)
    reader.record_read()  # after the next call, vLLM's own way again
    assert not sleeps(reader)


def test_a_notice_wakes_it(pair) -> None:
    writer, reader = pair
    waiting.sleep_at_once()
    awake = threading.Event()

    def wait() -> None:
        reader.wait(timeout_ms=None)
        awake.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while not awake.wait(0.05):  # until the sockets have found each other, a notice is lost
        writer.notify()
    thread.join(10)
