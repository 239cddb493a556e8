"""The server's life: listening, warm-up, health, reflection, TLS, drain, a dead engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraf.errors import ConfigError
from loraf_serve.adapters.registry import Registry
from loraf_serve.addresses import address_of, host_of, is_local
from loraf_serve.client import Client, ServiceError, request_of
from loraf_serve.service import server
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import GONE, FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, one_adapter, serving

CODES = grpc.StatusCode
NAMES = ("", "loraf.v1.GenerationService", "loraf.v1.AdapterService")


def states(running) -> set[str]:
    """Health of every service, by grpc's own client."""
    stub = health_pb2_grpc.HealthStub(running.channel)
    found = [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in NAMES]
    return {health_pb2.HealthCheckResponse.ServingStatus.Name(state) for state in found}


def long_request(tokens: int = 200) -> pb.StreamGenerateRequest:
    return request_of(pb.StreamGenerateRequest, "x", max_tokens=tokens)


# --- warm-up


def test_nothing_serves_until_the_warm_up_is_done():
    backend = FakeBackend()
    backend.gate = asyncio.Event()
    with serving(backend, warm=False) as running:
        assert states(running) == {"NOT_SERVING"}
        warming = running.spawn(running.server.warm_up())
        with pytest.raises(ServiceError, match="UNAVAILABLE: the model is still loading"):
            running.client.generate("x")
        assert states(running) == {"NOT_SERVING"}
        running.loop.call_soon_threadsafe(backend.gate.set)
        running.client.wait_until_serving(10)
        warming.result(10)
        assert states(running) == {"SERVING"}
        assert running.client.generate("x").text


def test_waiting_for_a_server_that_does_not_serve_ends_with_the_deadline():
    with serving(warm=False) as running, pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
        running.client.wait_until_serving(0.3)


# --- reflection


def test_reflection_describes_the_protocol_only_if_enabled():
    with serving(reflection=True) as running:
        database = ProtoReflectionDescriptorDatabase(running.channel)
        assert set(NAMES[1:]) | {"grpc.health.v1.Health"} <= set(database.get_services())
        found = DescriptorPool(database).FindServiceByName("loraf.v1.GenerationService")
        assert [method.name for method in found.methods] == ["Generate", "StreamGenerate"]
    with serving() as running, pytest.raises(grpc.RpcError) as error:
        ProtoReflectionDescriptorDatabase(running.channel).get_services()
    assert error.value.code() is CODES.UNIMPLEMENTED


# --- drain


def test_a_drain_lets_running_requests_end_and_refuses_new_ones():
    with serving(FakeBackend(seconds_per_token=0.05)) as running:
        call = running.generation.StreamGenerate(long_request(20))
        pieces = [next(call)]
        draining = running.spawn(running.server.drain(30.0))
        assert eventually(lambda: states(running) == {"NOT_SERVING"})
        with pytest.raises(ServiceError, match="UNAVAILABLE: the server is draining"):
            running.client.generate("x")
        pieces += list(call)
        assert "".join(p.choices[0].text for p in pieces) == expected_text(running.backend.requests[0])
        draining.result(10)
        assert running.backend.state == "stopped"
        with pytest.raises(ServiceError) as error:
            running.client.generate("x")
        assert error.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("hurried", [False, True])
def test_after_the_grace_requests_are_aborted_with_the_reason(hurried):
    with serving(FakeBackend(seconds_per_token=0.05)) as running:
        call = running.generation.StreamGenerate(long_request())
        next(call)
        hurry = asyncio.Event()
        began = time.monotonic()
        draining = running.spawn(running.server.drain(60.0 if hurried else 0.4, hurry))
        if hurried:
            time.sleep(0.2)
            running.loop.call_soon_threadsafe(hurry.set)
        last = list(call)[-1]
        assert last.choices[0].finish_reason == pb.FINISH_REASON_ABORTED
        draining.result(10)
        assert time.monotonic() - began < 5
        assert not running.backend.running


def test_an_idle_server_drains_at_once_even_while_somebody_watches_its_health():
    with serving() as running:
        watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
        running.call(running.server.drain(60.0))
        assert time.monotonic() - began < 5
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


# --- a dead engine


def test_a_dead_engine_is_noticed_without_a_request(monkeypatch):
    monkeypatch.setattr(server, "_HEALTH_CHECK_SECONDS", 0.05)
    with serving() as running:
        time.sleep(0.2)
        assert states(running) == {"SERVING"}
        running.backend.dead = RuntimeError("the look itself fails")
        time.sleep(0.2)
        assert states(running) == {"SERVING"}
        running.backend.dead = GONE
        assert eventually(lambda: states(running) == {"NOT_SERVING"})
        assert running.server.engine_gone
        with pytest.raises(ServiceError, match="UNAVAILABLE: the engine cannot answer any more"):
            running.client.generate("x")


# --- where it listens


def test_a_taken_port_is_refused():
    with serving() as running:

        async def second():
            wrong, _ = await server.create_server(FakeBackend(), Registry(), ServerOptions(port=running.port))
            await wrong.drain(0.0)

        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1"):
            asyncio.run(second())


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_ipv6_loopback():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback ({error})")
    with serving(host="::1") as running, Client(f"[::1]:{running.port}") as client:
        assert client.health() == "SERVING"


def test_a_request_beyond_the_limit_is_refused():
    with serving(max_message_bytes=2048) as running:
        with pytest.raises(ServiceError) as error:
            running.client.generate("x" * 3000)
        assert error.value.code == "RESOURCE_EXHAUSTED"
        assert running.client.generate("x" * 200).text


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("unix:/run/loraf.sock", True),
        ("unix:loraf.sock", True),
        ("unix-abstract:loraf", True),
        ("unix.example.org", False),
    ],
)
def test_hosts_of_this_machine_only_are_recognised(host, local):
    assert is_local(host) is local
    assert host_of(address_of(host, 50051)) == host
    problems = [problem.field for problem in ServerOptions(host=host).problems()]
    assert problems == ([] if local else ["--host"])
    assert not ServerOptions(host=host, insecure=True).problems()


def test_every_mistake_in_the_options_is_named_at_once(tmp_path):
    options = ServerOptions(
        host="0.0.0.0",
        port=70000,
        tls_client_ca=tmp_path / "ca",
        max_queue=0,
        max_message_bytes=3,
        default_deadline=-1.0,
        grace=float("nan"),
    )
    assert {problem.field for problem in options.problems()} == {
        "--host",
        "--port",
        "--tls-client-ca",
        "--max-queue",
        "--max-message-bytes",
        "--default-deadline",
        "--grace",
    }


# --- TLS


def test_tls(pki):
    with serving(tls_cert=pki / "server.crt", tls_key=pki / "server.key") as running:
        with Client(running.address, tls_ca=pki / "ca.crt") as client:
            assert client.generate("x").text
        for stranger in (Client(running.address), Client(running.address, tls_ca=pki / "other.crt")):
            with stranger, pytest.raises(ServiceError) as error:
                stranger.generate("x", timeout=5)
            assert error.value.code == "UNAVAILABLE"


def test_clients_need_a_certificate_where_the_server_requires_one(pki):
    options = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key", "tls_client_ca": pki / "ca.crt"}
    with serving(**options) as running:
        own = {"tls_ca": pki / "ca.crt", "tls_cert": pki / "client.crt", "tls_key": pki / "client.key"}
        with Client(running.address, **own) as client:
            assert client.generate("x").text
        forged = {"tls_ca": pki / "ca.crt", "tls_cert": pki / "other.crt", "tls_key": pki / "other.key"}
        for wrong in (Client(running.address, tls_ca=pki / "ca.crt"), Client(running.address, **forged)):
            with wrong, pytest.raises(ServiceError) as error:
                wrong.generate("x", timeout=5)
            assert error.value.code == "UNAVAILABLE"


def test_invalid_tls_files_are_refused(pki, tmp_path):
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    key, cert = pki / "server.key", pki / "server.crt"
    for options, fields in [
        ({"tls_cert": cert}, ["--tls-key"]),
        ({"tls_key": key}, ["--tls-cert"]),
        ({"tls_cert": cert, "tls_key": pki / "other.key"}, ["--tls-cert, --tls-key"]),
        ({"tls_cert": broken, "tls_key": key}, ["--tls-cert, --tls-key"]),
        ({"tls_cert": tmp_path / "missing", "tls_key": key}, ["--tls-cert, --tls-key"]),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": broken}, ["--tls-client-ca"]),
        ({"tls_cert": cert, "tls_key": key, "host": "0.0.0.0"}, []),
    ]:
        assert [problem.field for problem in ServerOptions(**options).problems()] == fields


def test_nothing_is_left_behind_by_a_server():
    before = threading.active_count()
    for _ in range(3):
        with serving() as running:
            assert running.client.generate("x").text
    assert eventually(lambda: threading.active_count() <= before + 1)  # grpc keeps one poller for the process


def test_a_unix_socket_serves_and_is_called_by_its_name(tmp_path):
    host, said = f"unix:{tmp_path}/s.sock", []

    def ask() -> int:
        assert eventually(lambda: any("listening" in line for line in said))
        with Client(host) as client:
            return len(client.generate("Hello", max_tokens=2).token_ids)

    async def scenario() -> None:
        options = ServerOptions(host=host, grace=0.0)
        running = asyncio.create_task(server.run(FakeBackend(), one_adapter(), options, None, None, said.append))
        assert await asyncio.to_thread(ask) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0

    asyncio.run(scenario())
    assert f"listening on {host}" in said and not any("warning" in line for line in said)
