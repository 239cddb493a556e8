"""A server that vanishes without closing its connections, as when its machine loses power."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loraf_serve.client import Unavailable, connection
from tests.loraf_serve.client.stand_in import CLIENTS, call
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import serving


@contextmanager
def relayed(address: str, cut: threading.Event) -> Iterator[str]:
    """Relays connections to `address`; once `cut` is set, swallows everything and closes nothing."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    sockets = [listener]

    def relay(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if not cut.is_set():
                    target.sendall(data)
        except OSError:
            return  # closed at the end

    def accept() -> None:
        try:
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                sockets.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=relay, args=pair, daemon=True).start()
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in sockets:
            one.close()


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_vanished_server_ends_the_call(kind, monkeypatch):
    monkeypatch.setattr(connection, "KEEPALIVE_MS", 300)
    monkeypatch.setattr(connection, "KEEPALIVE_TIMEOUT_MS", 300)
    cut = threading.Event()
    with serving(FakeBackend(seconds_per_token=0.1)) as running, relayed(running.address, cut) as address:
        threading.Timer(0.5, cut.set).start()
        began = time.monotonic()
        with pytest.raises(Unavailable, match="(?i)keepalive|ping timeout"):
            call(kind, address, "generate", "x", max_tokens=200, options={"retries": 0}, timeout=20)
        assert time.monotonic() - began < 8
