"""The HTTP door within the life of the server: loading, serving, draining, the engine's death, TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import threading
import time

import httpx
import openai
import pytest

from loraf.errors import ConfigError
from loraf_serve.backends.backend import EngineFailed, NotProven
from loraf_serve.backends.fallback import Fallback
from loraf_serve.http.door import HttpDoor
from loraf_serve.security import changes
from tests.loraf_serve.fake_backend import GONE, FakeBackend
from tests.loraf_serve.harness import eventually, serving
from tests.loraf_serve.http.stand import both_doors

BODY = {"model": "trio", "prompt": "x", "max_tokens": 3}


def test_while_the_server_loads_it_answers_that_it_does_not_serve():
    with both_doors(warm=False) as both:
        for response in (both.http.get("/health"), both.http.get("/v1/models"), both.post("/v1/completions", BODY)):
            assert response.status_code == 503 and "loading" in response.json()["error"]["message"]
        assert both.http.get("/").status_code == 200  # the page is there and says so
        assert both.grpc.client.health() == "NOT_SERVING"
        both.grpc.call(both.grpc.server.warm_up())
        assert both.http.get("/health").status_code == 200 and both.grpc.client.health() == "SERVING"


def test_health_is_serving_only_when_both_doors_are_open():
    opening = threading.Event()

    class SlowDoor(HttpDoor):
        async def open(self):
            await asyncio.to_thread(opening.wait)
            await super().open()

    made = []
    with serving(warm=False, doors=[lambda inside: made.append(SlowDoor(inside, 0)) or made[0]]) as running:
        warming = running.spawn(running.server.warm_up())
        time.sleep(0.1)
        assert running.client.health() == "NOT_SERVING"
        assert httpx.get(f"http://127.0.0.1:{made[0].port}/health").status_code == 503
        opening.set()
        warming.result(10)
        assert running.client.health() == "SERVING"
        assert httpx.get(f"http://127.0.0.1:{made[0].port}/health").status_code == 200


@pytest.mark.parametrize("parser", ["", "hermes"])
def test_a_parser_of_tools_without_vllm_is_said_to_have_no_effect(parser, caplog):
    with both_doors(tool_parser=parser) as both:
        assert both.http.get("/health").status_code == 200
    assert ("--tool-call-parser has no effect" in caplog.text) == bool(parser)


def test_a_drain_finishes_what_runs_and_refuses_the_rest():
    with both_doors(FakeBackend(seconds_per_token=0.02)) as both:
        stream = both.openai.completions.create(model="trio", prompt="x", max_tokens=40, stream=True)
        first = next(stream)
        draining = both.grpc.spawn(both.grpc.server.drain(30.0))
        assert eventually(lambda: both.http.get("/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="draining") as refused:
            both.openai.completions.create(model="trio", prompt="x")
        assert refused.value.status_code == 503
        rest = [event.choices[0].text for event in stream]
        assert len(rest) == 39 and first.choices[0].text
        draining.result(10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{both.url}/health")


def test_a_drain_without_grace_ends_streams_with_a_reason():
    with both_doors(FakeBackend(seconds_per_token=0.02)) as both:
        stream = both.openai.completions.create(model="trio", prompt="x", max_tokens=200, stream=True)
        next(stream)
        both.grpc.call(both.grpc.server.drain(0.0))
        assert list(stream)[-1].choices[0].finish_reason == "abort"


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_death_closes_both_doors(stream):
    backend = FakeBackend()
    backend.failure = GONE
    with both_doors(backend) as both:
        with pytest.raises(openai.InternalServerError) as gone:
            both.openai.completions.create(model="trio", prompt="x", stream=stream)
        assert gone.value.status_code == 503 and "secret" not in str(gone.value)
        assert both.grpc.server.engine_gone and both.grpc.client.health() == "NOT_SERVING"
        assert both.http.get("/health").status_code == 503


def test_a_death_in_the_middle_of_a_stream_is_told():
    backend = FakeBackend()
    backend.failure_after = GONE
    with both_doors(backend) as both, pytest.raises(openai.APIError, match="engine") as gone:
        list(both.openai.completions.create(model="trio", prompt="x", max_tokens=9, stream=True))
    assert "secret" not in str(gone.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_stops_the_request(stream):
    backend = FakeBackend(seconds_per_token=0.05)
    with both_doors(backend) as both:
        body = BODY | {"max_tokens": 200, "stream": stream, "prompt": ["x", "y"]}
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=both.url) as client,
            client.stream("POST", "/v1/completions", json=body, timeout=0.3) as response,
        ):
            next(response.iter_raw())
            raise httpx.ReadTimeout("enough") if stream else AssertionError
        assert eventually(lambda: len(backend.closed_early) == 2 and not backend.running)
        assert both.grpc.server._admission.in_flight == 0 and not both.grpc.server._library._leases


def test_a_port_that_is_taken_is_a_mistake_of_the_user():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match="--http-port.*choose another port"),
            serving(doors=[lambda inside: HttpDoor(inside, port)]),
        ):
            pass


def test_a_backend_that_is_replaced_at_start_is_the_one_that_answers():
    first, second = FakeBackend(), FakeBackend()

    async def fails():
        raise EngineFailed("no")

    first.start = fails
    backend = Fallback(first, {EngineFailed: lambda _: second, NotProven: lambda _: FakeBackend()}, print, lambda a: a)
    with both_doors(backend) as both:
        assert both.openai.completions.create(model="trio", prompt="x", max_tokens=2).choices
        assert len(second.requests) == 1
        assert not backend._others  # from the first answer on, the backend stays


def test_certificates_are_replaced_while_the_server_runs(pki, tmp_path, monkeypatch):
    for name in ("server.crt", "server.key"):
        shutil.copy(pki / name, tmp_path / name)
    files = {"tls_cert": tmp_path / "server.crt", "tls_key": tmp_path / "server.key"}
    monkeypatch.setattr("loraf_serve.security.contexts.Changes", lambda paths: changes.Changes(paths, 0.0))
    trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    with both_doors(verify=trusting, **files) as both:
        assert both.url.startswith("https") and both.http.get("/health").status_code == 200
        (tmp_path / "server.crt").write_text("half of a certificate")
        with httpx.Client(base_url=both.url, verify=trusting) as client:
            assert client.get("/health").status_code == 200  # the one before stays in use
        shutil.copy(pki / "other.crt", tmp_path / "server.crt")
        shutil.copy(pki / "other.key", tmp_path / "server.key")
        with httpx.Client(base_url=both.url, verify=trusting) as client, pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_clients_must_show_a_certificate_where_grpcs_must(pki):
    files = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key", "tls_client_ca": pki / "ca.crt"}
    trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    with both_doors(verify=trusting, **files) as both:
        with pytest.raises(httpx.HTTPError):
            both.http.get("/health")
        trusting.load_cert_chain(pki / "client.crt", pki / "client.key")
        with httpx.Client(base_url=both.url, verify=trusting) as client:
            assert client.get("/health").status_code == 200
