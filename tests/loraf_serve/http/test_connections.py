"""What a client without a token can do with connections alone, over real sockets: it keeps nobody else out."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import ssl
from collections.abc import Iterator

import httpx
import pytest

from loraf_serve.http import door
from loraf_serve.http.connections import Connection
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import eventually
from tests.loraf_serve.http.stand import Both, both_doors

TOKEN = "whole-0123456789abcdef"
BODY = {"model": "trio", "prompt": "x", "max_tokens": 3}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# What each of the connections sends, and then nothing more.
BEGINNINGS = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: loc",
    "a whole request": HEALTH,
    "no body": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 50\r\n\r\n{",
    "answers that nobody reads": b"GET /page/main.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100,
}
MORE = 28  # connections than requests in flight; few, to keep these tests short


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Both]:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "_MORE_CONNECTIONS", MORE)
        with both_doors(FakeBackend(seconds_per_token=0.01), token_file=file, token=TOKEN, max_queue=4) as doors:
            yield doors


def limit_of(both: Both) -> int:
    return both.door._crowd.limit


@contextlib.contextmanager
def crowd(both: Both, count: int, beginning: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", both.door.port))
            with contextlib.suppress(OSError):  # it may have been closed for another one already
                one.settimeout(0.05)
                one.sendall(beginning)
            sockets.append(one)
        yield sockets


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_connections_of_strangers_keep_nobody_out(guarded, beginning):
    limit = limit_of(guarded)
    before = guarded.http.get("/v1/models")  # its connection stays open
    with guarded.openai.completions.create(model="trio", prompt="x", max_tokens=200, stream=True) as stream:
        next(stream)
        with crowd(guarded, limit + 40, beginning):
            assert len(guarded.door._crowd) <= limit
            assert httpx.get(f"{guarded.url}/health").status_code == 200
            headers = {"Authorization": f"Bearer {TOKEN}"}
            assert httpx.post(f"{guarded.url}/v1/completions", json=BODY, headers=headers).status_code == 200
            assert guarded.http.get("/v1/models").status_code == before.status_code == 200
            assert sum(1 for _ in stream) == 199, "a stream was cut off for somebody else's connection"


def test_a_connection_that_has_shown_a_token_outlasts_those_that_have_not(guarded):
    def ask(connection: socket.socket, more: bytes = b"") -> bytes:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + more + b"\r\n")
        answer = b""
        while not answer.endswith(b"}") and (part := connection.recv(65536)):
            answer += part
        return answer

    with contextlib.ExitStack() as stack:
        one, other = (
            stack.enter_context(socket.create_connection(("127.0.0.1", guarded.door.port), 10)) for _ in range(2)
        )
        token = f"Authorization: Bearer {TOKEN}\r\n".encode()
        assert b" 200 " in ask(one, token) and b" 401 " in ask(other)
        stack.enter_context(crowd(guarded, limit_of(guarded), HEALTH))
        assert b" 200 " in ask(one, token)
        with contextlib.suppress(OSError):
            assert ask(other, token) == b""


def test_handshakes_that_do_not_end_keep_nobody_out(pki, monkeypatch):
    files = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key"}
    trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    monkeypatch.setattr(door, "_MORE_CONNECTIONS", MORE)
    with both_doors(verify=trusting, max_queue=4, **files) as both:
        with crowd(both, limit_of(both) + 40):
            assert httpx.get(f"{both.url}/health", verify=trusting).status_code == 200
            assert len(both.door._crowd) <= limit_of(both)
            monkeypatch.setattr("loraf_serve.http.connections.HANDSHAKE_SECONDS", 0.2)
            with socket.create_connection(("127.0.0.1", both.door.port), 10) as late:
                assert late.recv(100) == b""
            with socket.create_connection(("127.0.0.1", both.door.port), 10) as noise:
                noise.sendall(HEALTH)
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP/1.1 200" not in noise.recv(1000)
        assert both.post("/v1/completions", BODY).status_code == 200
        assert eventually(lambda: len(both.door._crowd) <= 2)


def test_a_burst_opens_few_files_at_a_time(guarded, monkeypatch):
    """Connections that are accepted before any is closed for them would use up the files that the process may open."""
    accepted, lost, most = 0, 0, 0

    class Counted(Connection):
        def __init__(self, *arguments, **named):
            nonlocal accepted, most
            super().__init__(*arguments, **named)
            accepted += 1
            most = max(most, accepted - lost)

        def connection_lost(self, exc):
            nonlocal lost
            lost += 1
            super().connection_lost(exc)

    monkeypatch.setattr(door, "Connection", Counted)
    with contextlib.ExitStack() as stack:

        async def burst() -> None:  # on the server's loop, which accepts none meanwhile
            for _ in range(900):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", guarded.door.port))

        guarded.grpc.call(burst())
        assert eventually(lambda: accepted >= 900)
        assert most <= limit_of(guarded) + 4 * door._AT_ONCE
    assert guarded.http.get("/health").status_code == 200


def test_the_process_may_open_as_many_files_as_the_door_has_connections():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert door._possible(1000) == 1000
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2000
        assert door._possible(hard) == hard // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/%b\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("version", "lengths"),
    [
        (b"1.1", b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
        (b"1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
        (b"1.1", b"transfer-encoding: Chunked\r\ncontent-length: 0"),
        (b"1.0", b"Connection: keep-alive\r\nTransfer-Encoding: chunked"),
        (b"1.1", b"Content-Length: 5\r\nContent-Length: 6"),
        (b"1.1", b"Transfer-Encoding: gzip, chunked"),
        (b"1.1", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        (b"1.1", b"Content-Length: +5"),
    ],
)
def test_a_request_of_two_lengths_is_refused_and_nothing_after_it_is_read(guarded, version, lengths):
    with socket.create_connection(("127.0.0.1", guarded.door.port), 10) as connection:
        connection.sendall(HEAD % version + lengths + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 400 " in head and b"connection: close" in head.lower()
    assert len(re.findall(rb"HTTP/1\.1 [0-9]{3}", answer)) == 1
    assert json.loads(body)["error"]["code"] == 400


def test_noise_after_an_answer_has_begun_ends_the_connection_without_a_traceback(guarded, caplog):
    head = HEAD % b"1.1" + b"Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.door.port), 10) as connection:
        connection.sendall(head)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert b" 401 " in answer
        connection.sendall(b"no length of a chunk\r\n")
        with contextlib.suppress(ConnectionError):
            assert connection.recv(65536) == b""
    assert eventually(lambda: guarded.http.get("/health").status_code == 200)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "noise", [b"nothing\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET /\x01 HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_is_refused_as_everything_else(guarded, noise):
    with socket.create_connection(("127.0.0.1", guarded.door.port), 10) as connection:
        connection.sendall(noise)
        answer = connection.recv(65536)
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == 400 and error["type"] == "BadRequestError" and error["problems"][0]["remedy"]
