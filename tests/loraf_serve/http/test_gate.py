"""What every HTTP call passes: host, origin, route, token, permissions, size; and what observers see of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time

import httpx
import openai
import pytest

from loraf_serve.observe.call import Observer
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import eventually, two_adapters
from tests.loraf_serve.http.stand import both_doors, pause_all

COMPLETION = {"model": "trio", "prompt": "x", "max_tokens": 3}
ORIGIN = "https://app.example.org"
# Routes of vLLM's own server, and of FastAPI.
UNLISTED = (
    *("/docs", "/redoc", "/openapi.json", "/metrics", "/version", "/ping", "/load", "/server_info", "/is_sleeping"),
    *("/sleep", "/wake_up", "/reset_prefix_cache", "/collective_rpc", "/start_profile", "/v1/load_lora_adapter"),
    *("/v1/unload_lora_adapter", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/audio/transcriptions"),
    *("/v1/score", "/rerank", "/pooling", "/tokenize", "/detokenize", "/inference/v1/generate", "/invocations"),
    *("/v1/chat/completions/batch", "/v1/completions/render", "/v1/models/", "/v1/models/a/b", "//v1/models"),
    *("/page/../cli.py", "/page/%2e%2e/cli.py", "/page/__init__.py", "/page/", "/loraf/v1/adapters/trio", "/V1/models"),
)


@pytest.fixture(scope="module")
def both():
    with both_doors(allowed_origins=[ORIGIN], max_message_bytes=4096) as doors:
        yield doors


# --- routes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNLISTED)
def test_what_is_not_listed_is_not_there(both, path):
    connection = http.client.HTTPConnection("127.0.0.1", both.door.port)  # sends the path as it is
    for method in ("GET", "POST"):
        connection.request(method, path, b"{}" if method == "POST" else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert response.status == error["code"] == (405 if method == "POST" and path.startswith("/page/__") else 404)
    connection.close()


def test_a_path_has_its_methods_alone(both):
    refused = both.http.get("/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    assert both.http.delete("/v1/models").status_code == 405
    assert both.http.request("TRACE", "/health").status_code == 405
    assert both.http.head("/health").status_code == 200


def test_the_page_needs_no_token_and_may_load_nothing_from_elsewhere(both):
    for path, kind in (("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/style.css", "text/css")):
        response = httpx.get(both.url + path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_models_are_listed_and_any_set_can_be_looked_up(both):
    names = [model.id for model in both.openai.models.list()]
    assert names == ["base", "trio", "trio@math", "trio@nlu", "trio@code"]
    assert both.openai.models.retrieve("trio@nlu+math:0.5").root == "trio@math:0.5+nlu"
    with pytest.raises(openai.NotFoundError, match="there is no task 'maht'"):
        both.openai.models.retrieve("trio@maht")
    with pytest.raises(openai.NotFoundError, match="choose from: base, trio"):
        both.openai.models.retrieve("gpt-4")


def test_the_pages_questions_are_answered_as_over_grpc(both):
    server = both.http.get("/loraf/v1/server").json()
    assert server["backend"] == both.grpc.client.server_info().backend == "fake"
    (adapter,) = both.http.get("/loraf/v1/adapters").json()["adapters"]
    assert adapter["digest"] == both.grpc.client.adapters()[0].digest
    assert both.http.get("/loraf/v1/adapters/trio/report").json()["digest"] == adapter["digest"]
    assert both.http.get("/loraf/v1/adapters/nobody/report").status_code == 404


# --- browsers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "0.0.0.0", "[::]"])
def test_a_foreign_host_is_refused_on_loopback(both, host):
    for path in ("/", "/health", "/v1/models"):
        refused = both.http.get(path, headers={"Host": host})
        assert refused.status_code in (400, 403), (path, refused.text)
    assert both.post("/v1/completions", COMPLETION, Host=host).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:80", "127.1.2.3", "LOCALHOST:1"])
def test_names_of_this_machine_are_taken(both, host):
    assert both.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", f"{ORIGIN}.evil.example"])
def test_pages_of_another_origin_may_not_call(both, origin):
    refused = both.post("/v1/completions", COMPLETION, Origin=origin)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    preflight = both.http.options(
        "/v1/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 403
    assert (
        both.http.get("/v1/models", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status_code
        == 403
    )


def test_pages_of_an_allowed_origin_may_call(both):
    preflight = both.http.options(
        "/v1/completions", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == ORIGIN
    answered = both.post("/v1/completions", COMPLETION, Origin=ORIGIN)
    assert answered.status_code == 200 and answered.headers["access-control-allow-origin"] == ORIGIN
    refused = both.post("/v1/completions", {}, Origin=ORIGIN)
    assert refused.status_code == 400 and refused.headers["vary"] == "Origin"  # a page can read why
    assert both.post("/v1/completions", COMPLETION, Origin=both.url).status_code == 200  # the server's own page
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert both.http.get("/", headers=link).status_code == 200


# --- bodies --------------------------------------------------------------------------------------------------------

BODIES = [
    (b"", 400),
    (b"[]", 400),
    (b"nothing", 400),
    (b"\xff\xfe", 400),
    (b'{"model": NaN}', 400),
    (b'{"model": "trio", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\uD800"}]}', 400),
    (b'{"n": 1, "n": 2, "prompt": "x"}', 400),
    (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
    (b'{"a":' * 100_000, 413),
    (b'{"prompt": "' + b"x" * 5000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
def test_a_body_that_cannot_be_used(both, body, status):
    for path in ("/v1/completions", "/v1/chat/completions"):
        refused = both.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"]


def test_a_pair_of_surrogates_is_a_character(both):
    body = b'{"model": "trio", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert (
        both.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 200
    )


def test_a_body_in_chunks_is_limited_too(both):
    def parts():
        for _ in range(100):
            yield b" " * 1000

    refused = both.http.post("/v1/completions", content=parts(), headers={"Content-Type": "application/json"})
    assert refused.status_code == 413


def test_a_body_must_say_that_it_is_json(both):
    refused = both.http.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert refused.status_code == 415
    assert both.http.post("/v1/completions", data={"model": "trio"}).status_code == 415


def test_a_body_that_does_not_arrive_ends_the_call(both, monkeypatch):
    monkeypatch.setattr("loraf_serve.http.exchange.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", both.door.port), 5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(4096)


def test_a_head_that_does_not_arrive_ends_the_connection(both, monkeypatch):
    monkeypatch.setattr("loraf_serve.http.connections.HEAD_SECONDS", 0.2)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nHost: loc"):
        with socket.create_connection(("127.0.0.1", both.door.port), 5) as connection:
            connection.sendall(beginning)
            assert connection.recv(4096) == b""
    with socket.create_connection(("127.0.0.1", both.door.port), 5) as connection:
        for _ in range(2):  # also after an answer
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert b" 200 " in answer
        connection.sendall(b"GET")
        assert connection.recv(4096) == b""


def test_noise_and_long_heads_harm_nobody(both):
    for noise in (b"\x16\x03\x01" * 50, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 200_000, b"\r\n" * 1000):
        address = ("127.0.0.1", both.door.port)
        with contextlib.suppress(OSError), socket.create_connection(address, 5) as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert both.http.get("/health").status_code == 200


# --- request ids and observers -------------------------------------------------------------------------------------


class Seen(Observer):
    def __init__(self):
        self.calls, self.tokens_seen, self.answered = [], 0, 0

    def answering(self, call):
        self.answered += 1

    def tokens(self, call, count, since):
        self.tokens_seen += count

    def ended(self, call):
        self.calls.append(call)


def test_observers_see_http_as_grpc():
    seen = Seen()
    with both_doors(observers=[seen]) as both:
        response = both.post("/v1/completions", COMPLETION | {"model": "trio@math"}, **{"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine" and response.json()["id"] == "cmpl-mine"
        both.post("/v1/completions", COMPLETION | {"request_id": "ours", "n": 99}, **{"X-Request-Id": "theirs"})
        both.http.get("/v1/models")
        both.http.get("/health")
        both.http.get("/nothing")
        assert eventually(lambda: len(seen.calls) == 3)
    first, second, third = seen.calls
    assert (first.method, first.name, first.code) == ("POST /v1/completions", "/v1/completions", "OK")
    assert (first.request_id, first.adapter, first.task_set) == ("mine", "trio", "math")
    assert (first.prompt_tokens, first.completion_tokens) == (2, 3)
    assert first.began <= first.answering <= first.first_token <= first.ended
    assert (seen.answered, seen.tokens_seen) == (1, 3)
    assert (second.request_id, second.code) == ("ours", "INVALID_ARGUMENT")
    assert (third.name, third.code) == ("/v1/models", "OK")


@pytest.mark.parametrize("request_id", ["x" * 200, "\u00e9", "a\tb"])
def test_an_unusable_request_id_is_not_taken(both, request_id):
    response = both.http.get("/v1/models", headers={b"X-Request-Id": request_id.encode("latin-1")})
    assert response.status_code == 200
    for unusable in (request_id, "x" * 3000):
        refused = both.post("/v1/completions", COMPLETION | {"request_id": unusable})
        assert refused.status_code == (200 if unusable == "\u00e9" else 400)
        assert len(refused.headers["x-request-id"]) <= 3 * 128


def test_a_client_that_reads_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr("loraf_serve.http.exchange.STALL_SECONDS", 0.3)
    backend, seen = FakeBackend(seconds_per_token=0.01, max_model_len=4000), Seen()
    body = json.dumps({"model": "trio", "prompt": "x", "max_tokens": 3000, "stream": True}).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        both_doors(backend, observers=[seen]) as both,
        socket.create_connection(("127.0.0.1", both.door.port), 5) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)
        assert eventually(lambda: both.grpc.server._admission.in_flight == 1)
        pause_all(both)
        assert eventually(lambda: both.grpc.server._admission.in_flight == 0)
        assert eventually(lambda: seen.calls and seen.calls[-1].code == "RESOURCE_EXHAUSTED")
        assert not backend.running


def test_an_answer_that_nobody_reads_takes_little_memory(monkeypatch):
    monkeypatch.setattr("loraf_serve.service.outbox.MAX_WAITING_BYTES", 10_000)
    monkeypatch.setattr("loraf_serve.service.outbox._ROOM_SECONDS", 0.1)
    backend, seen = FakeBackend(seconds_per_token=0.001, max_model_len=4000), Seen()
    with both_doors(backend, observers=[seen]) as both, httpx.Client(base_url=both.url) as client:
        body = {"model": "trio", "prompt": "x", "max_tokens": 3000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body):
            pause_all(both)
            assert eventually(lambda: seen.calls and seen.calls[-1].code == "RESOURCE_EXHAUSTED")
        assert seen.tokens_seen < 1000 and not backend.running


# --- tokens --------------------------------------------------------------------------------------------------------

WHOLE, LIMITED, URGENT = "whole-0123456789abcdef", "limited-0123456789abc", "urgent-0123456789abcd"
ONLY_NLU = "only-nlu-0123456789ab"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    lines = (
        f"{WHOLE} name=whole in-flight=3",
        f"{LIMITED} name=limited adapter=trio tasks=math",
        f"{URGENT} name=urgent priority tokens-per-minute=50",
        f"{ONLY_NLU} name=only-nlu tasks=nlu",
    )
    file.write_text("\n".join(lines))
    with both_doors(adapters=two_adapters(), token_file=file, token=WHOLE) as doors:
        yield doors


@pytest.mark.parametrize("header", [None, "Bearer wrong-0123456789abcd", f"Basic {WHOLE}", WHOLE, "Bearer"])
def test_without_a_token_nothing_but_the_page_and_health(guarded, header):
    headers = {"Authorization": header} if header else {}
    for path in ("/v1/models", "/loraf/v1/server", "/loraf/v1/adapters", "/loraf/v1/adapters/trio/report"):
        refused = httpx.get(guarded.url + path, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    refused = httpx.post(f"{guarded.url}/v1/completions", json=COMPLETION, headers=headers)
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "AuthenticationError"
    assert httpx.get(f"{guarded.url}/health").status_code == 200 and httpx.get(guarded.url).status_code == 200


def test_what_a_token_may_not_use_does_not_exist_for_it(guarded):
    client = guarded.client(LIMITED)
    assert [model.id for model in client.models.list()] == ["base", "trio@math"]
    assert client.completions.create(model="trio@math", prompt="x", max_tokens=2).choices
    assert client.completions.create(model="base", prompt="x", max_tokens=2).choices
    for name in ("pair", "pair@nlu", "nobody"):
        with pytest.raises(openai.PermissionDeniedError, match="may not use adapter") as refused:
            client.completions.create(model=name, prompt="x")
        assert refused.value.param == "model" and "nlu" not in str(refused.value).replace(name, "")
    for name in ("trio", "trio@all", "trio@nlu", "trio@math+nlu", "trio@as_trained=code"):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.completions.create(model=name, prompt="x")
        hidden = {"nlu", "code"} - set(name.replace("+", "@").replace("=", "@").split("@"))
        assert not any(task in refused.value.body["message"] for task in hidden)
    for name in ("trio@math+maht", "@math"):
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model=name, prompt="x", n=99)
        assert "nlu" not in refused.value.body["message"] and "code" not in refused.value.body["message"]
    headers = {"Authorization": f"Bearer {LIMITED}"}
    (adapter,) = httpx.get(f"{guarded.url}/loraf/v1/adapters", headers=headers).json()["adapters"]
    assert [task["name"] for task in adapter["tasks"]] == ["math"]
    assert httpx.get(f"{guarded.url}/loraf/v1/adapters/pair/report", headers=headers).status_code == 403
    report = httpx.get(f"{guarded.url}/loraf/v1/adapters/trio/report", headers=headers)
    assert report.status_code == 200 and "nlu" not in report.text
    assert httpx.get(f"{guarded.url}/v1/models/trio@nlu", headers=headers).status_code == 403


def test_remedies_name_models_that_the_token_may_use(guarded):
    limited, of_any_adapter = guarded.client(LIMITED), guarded.client(ONLY_NLU)
    refusals = [
        (limited, "trio", openai.PermissionDeniedError, "base, trio@math;"),
        (limited, "pair", openai.PermissionDeniedError, "base, trio@math;"),
        (limited, "trio@math+nlu", openai.PermissionDeniedError, "base, trio@math;"),
        (of_any_adapter, "pair", openai.PermissionDeniedError, "base, trio@nlu, pair@nlu;"),
        (of_any_adapter, "gpt-4", openai.NotFoundError, "base, trio@nlu, pair@nlu;"),
        (of_any_adapter, "", openai.BadRequestError, "choose from: trio, pair"),
        (of_any_adapter, "trio@maht", openai.APIStatusError, "base, trio@nlu, pair@nlu;"),
    ]
    for client, model, error, remedy in refusals:
        with pytest.raises(error) as refused:
            client.completions.create(model=model, prompt="x")
        (problem,) = refused.value.body["problems"]
        assert problem["field"] == "model" and remedy in problem["remedy"], problem
        if model and "/" not in model:
            with pytest.raises(error) as looked_up:
                client.models.retrieve(model)
            assert remedy in looked_up.value.body["problems"][0]["remedy"]
        for name in remedy.removesuffix(";").split(", "):
            if "@" in name:
                assert client.completions.create(model=name, prompt="x", max_tokens=1).choices


def test_limits_of_a_token(guarded):
    with pytest.raises(openai.PermissionDeniedError, match="priority"):
        guarded.openai.completions.create(model="trio", prompt="x", extra_body={"priority": 1})
    with pytest.raises(openai.BadRequestError, match="4 prompts, and at most 3 requests"):
        guarded.openai.completions.create(model="trio", prompt=["x"] * 4)
    urgent = guarded.client(URGENT)
    assert urgent.completions.create(model="trio", prompt="x", max_tokens=60, extra_body={"priority": 1}).choices
    with pytest.raises(openai.RateLimitError, match="tokens a minute") as refused:
        urgent.completions.create(model="trio", prompt="x")
    assert int(refused.value.response.headers["retry-after"]) > 1


def test_several_adapters_need_a_name(guarded):
    for name in ("", "@math"):
        with pytest.raises(openai.BadRequestError, match="choose from: trio, pair"):
            guarded.openai.completions.create(model=name, prompt="x")
    assert guarded.openai.completions.create(model="base", prompt="x").system_fingerprint == "loraf:base"


def test_a_token_is_looked_up_before_the_body_is_read(guarded):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", guarded.door.port), 5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n")
        assert b" 401 " in connection.recv(4096)
    assert time.monotonic() - began < 3
