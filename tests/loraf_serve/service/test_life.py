"""Connections and the end of the server: keepalive, age, certificates that change, drain delay, a dead engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from h2.connection import H2Connection
from h2.exceptions import ProtocolError

from loraf_serve.client import Client, ServiceError
from loraf_serve.service import server
from loraf_serve.service.server_options import ServerOptions
from tests.loraf_serve.asking import ask, ask_stream, failure
from tests.loraf_serve.fake_backend import GONE, FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, one_adapter, serving
from tests.loraf_serve.pki import make_certificate, make_pki

CODES = grpc.StatusCode


@pytest.mark.parametrize(("seconds", "answered"), [(0.3, True), (0.03, False)])
def test_a_client_may_ping_now_and_then_but_not_all_the_time(monkeypatch, seconds, answered):
    """The server's least time between pings, 5 s, scaled down: a client that pings every 10 s stays, one that pings
    every second does not. gRPC's own client raises shorter times to 10 s, so frames are sent by hand."""
    monkeypatch.setattr(server, "_CLIENT_PING_MS", 150)
    with serving(FakeBackend(seconds_per_token=0.02)) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.settimeout(0.05)
            state = H2Connection()
            state.initiate_connection()
            headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x")]
            headers += [(":path", "/loraf.v1.GenerationService/Generate")]
            headers += [("te", "trailers"), ("content-type", "application/grpc")]
            state.send_headers(1, headers)
            body = ask("x", max_tokens=100).SerializeToString()
            state.send_data(1, b"\0" + len(body).to_bytes(4, "big") + body, end_stream=True)
            events, cut_off, began = [], False, time.monotonic()
            while time.monotonic() - began < 60 and not cut_off and not ended(events):
                connection.sendall(state.data_to_send())
                time.sleep(seconds)
                state.ping(b"12345678")
                try:
                    data = connection.recv(1 << 16)
                    events += state.receive_data(data)
                    cut_off = not data or any(type(event).__name__ == "ConnectionTerminated" for event in events)
                except TimeoutError:
                    continue
                except (ConnectionError, ProtocolError):  # the rest of what the server had begun to say
                    cut_off = True
        assert (ended(events), cut_off) == (answered, not answered)


def ended(events: list) -> bool:
    return any(type(event).__name__ == "StreamEnded" for event in events)


def test_an_old_connection_is_renewed_and_no_stream_is_cut_off():
    with serving(FakeBackend(seconds_per_token=0.05), max_connection_age=0.5) as running:
        states = []
        running.channel.subscribe(states.append)
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=60))  # three seconds: six ages
        text = "".join(piece.choices[0].text for piece in call)
        assert text == expected_text(running.backend.requests[0])
        assert eventually(lambda: grpc.ChannelConnectivity.IDLE in states)  # it was asked to leave
        assert running.generation.Generate(ask("x", max_tokens=1)).choices


def test_certificates_are_replaced_without_a_restart(tmp_path):
    pki = make_pki(tmp_path)
    shutil.copy(pki / "server.crt", pki / "current.crt")
    shutil.copy(pki / "server.key", pki / "current.key")
    with serving(tls_cert=pki / "current.crt", tls_key=pki / "current.key") as running:

        def trusts(authority: str) -> bool:
            with Client(running.address, tls_ca=pki / f"{authority}.crt", retries=0) as client:
                try:
                    return bool(client.generate("x", max_tokens=1, timeout=5).text)
                except ServiceError:
                    return False

        with Client(running.address, tls_ca=pki / "ca.crt") as old:
            assert old.generate("x", max_tokens=1).text
            (pki / "current.crt").write_text("half written")
            time.sleep(1.1)  # the files are looked at once a second
            assert trusts("ca")  # the old pair stays in use
            signed = ("-CA", "other.crt", "-CAkey", "other.key", "-addext", "basicConstraints=critical,CA:FALSE")
            make_certificate(pki, "new", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
            os.replace(pki / "new.crt", pki / "current.crt")
            os.replace(pki / "new.key", pki / "current.key")
            assert eventually(lambda: trusts("other"))
            assert not trusts("ca")
            assert old.generate("x", max_tokens=1).text  # a connection that is open stays open


def test_during_the_drain_delay_requests_are_accepted_while_health_says_not_serving():
    with serving(FakeBackend(seconds_per_token=0.01)) as running:
        hurry = asyncio.Event()
        draining = running.spawn(running.server.drain(10.0, hurry, delay=60.0))
        assert eventually(lambda: running.client.health() == "NOT_SERVING")
        assert running.generation.Generate(ask("x", max_tokens=3)).choices
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=30))
        next(call)
        running.loop.call_soon_threadsafe(hurry.set)
        list(call)
        draining.result(20)


def test_a_full_queue_says_when_to_try_again_in_a_way_that_grpc_clients_obey():
    with serving(FakeBackend(seconds_per_token=0.05), max_queue=1) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=60))
        next(call)
        error = failure(lambda: running.generation.Generate(ask("x")))
        assert error.code() is CODES.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 100
        call.cancel()


def test_the_process_ends_with_an_error_when_the_engine_dies():
    said: list[str] = []
    backend = FakeBackend()

    async def scenario() -> int:
        options = ServerOptions(port=0, grace=30.0, drain_delay=30.0)
        running = asyncio.create_task(server.run(backend, one_adapter(), options, None, None, said.append))
        while not any("listening" in line for line in said):
            await asyncio.sleep(0.01)
        address = next(line for line in said if "listening" in line).split()[-1]
        backend.dead = GONE
        died = time.monotonic()

        def health() -> str:
            with Client(address, retries=0) as client:
                return client.health()

        while await asyncio.to_thread(health) == "SERVING":
            await asyncio.sleep(0.05)
        assert time.monotonic() - died < 2
        status = await asyncio.wait_for(running, 10)  # neither the grace nor the delay keeps it
        assert backend.state == "stopped"
        return status

    assert asyncio.run(scenario()) == 1
    assert not any("secret" in line for line in said)


DYING = """
import asyncio, sys
from loraf_serve.service import server
from loraf_serve.service.server_options import ServerOptions
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import one_adapter
sys.exit(asyncio.run(server.run(FakeBackend(0.05), one_adapter(), ServerOptions(port=0), None, None,
                                lambda line: print(line, flush=True))))
"""


def test_two_signals_end_the_process_at_once_and_cleanly():
    process = subprocess.Popen([sys.executable, "-c", DYING], stdout=subprocess.PIPE, text=True)
    try:
        address = next(line for line in process.stdout if "listening" in line).split()[-1]
        with Client(address) as client:
            stream = client.stream("x", max_tokens=200)
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: client.health() == "NOT_SERVING")  # two signals that wait count as one
            process.send_signal(signal.SIGTERM)
            assert [piece.finish_reason for piece in stream][-1] == "aborted"
        assert process.wait(25) == 0
    finally:
        process.kill()
        process.wait()
