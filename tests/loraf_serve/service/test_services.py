"""The two services as a client meets them: answers, statuses, cancellation, admission."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from loraf.errors import CorruptCheckpoint, LorafError, Problem
from loraf_serve.service import outbox
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.asking import ask, ask_stream, failure, metadata_bytes, violations
from tests.loraf_serve.fake_backend import GONE, FakeBackend, expected_text
from tests.loraf_serve.harness import checkpoint_folder, eventually, one_adapter, serving, two_adapters

CODES = grpc.StatusCode


@pytest.fixture(scope="module")
def running():
    with serving(adapters=two_adapters()) as server:
        yield server


# --- answers


@pytest.mark.parametrize(
    ("selection", "tasks"),
    [
        ({}, [("math", 1.0), ("nlu", 1.0), ("code", 1.0)]),
        ({"tasks": {"code": 0.5, "math": 1.0}}, [("math", 1.0), ("code", 0.5)]),
        ({"as_trained": "nlu"}, [("math", 1.0), ("nlu", 1.0)]),
        ({"base": True}, []),
        ({"tasks": {"math": 0.0}}, []),
    ],
)
def test_the_answer_is_that_of_the_selected_set_and_names_it(running, selection, tasks):
    response = running.generation.Generate(ask("hello", request_id="mine", max_tokens=7, n=2, **selection))
    passed = running.backend.requests[-1]
    assert [choice.text for choice in response.choices] == [expected_text(passed, 0), expected_text(passed, 1)]
    assert response.request_id == "mine"
    assert response.served_by.adapter == "trio"
    assert response.served_by.digest == one_adapter().get("trio").digest
    assert [(task.name, task.weight) for task in response.served_by.tasks] == tasks
    assert all(task.HasField("weight") for task in response.served_by.tasks)
    assert response.served_by.backend == "fake"
    assert response.usage == pb.Usage(prompt_tokens=6, cached_prompt_tokens=1, completion_tokens=14)
    for choice in response.choices:
        assert running.backend.tokenizer.decode(choice.token_ids) == choice.text
        assert choice.finish_reason == pb.FINISH_REASON_LENGTH


def test_different_sets_adapters_and_weights_have_different_answers(running):
    chosen = [
        {},
        {"tasks": ["math"]},
        {"tasks": {"math": 0.5}},
        {"tasks": ["nlu"]},
        {"base": True},
        {"adapter": "pair"},
    ]
    texts = {running.generation.Generate(ask("hello", max_tokens=12, **each)).choices[0].text for each in chosen}
    assert len(texts) == len(chosen)


@pytest.mark.parametrize("n", [1, 3])
def test_the_pieces_of_a_stream_are_the_whole_answer(running, n):
    whole = running.generation.Generate(ask("hello", max_tokens=9, n=n, logprobs=2, request_id="r"))
    pieces = list(running.generation.StreamGenerate(ask_stream("hello", max_tokens=9, n=n, logprobs=2, request_id="r")))
    assert len(pieces) == 9
    for choice in whole.choices:
        news = [new for piece in pieces for new in piece.choices if new.index == choice.index]
        assert "".join(new.text for new in news) == choice.text
        assert [token for new in news for token in new.token_ids] == list(choice.token_ids)
        assert [entry for new in news for entry in new.logprobs] == list(choice.logprobs)
        assert len(choice.logprobs) == 9 and len(choice.logprobs[0].top) == 2
        assert [new.finish_reason for new in news] == [pb.FINISH_REASON_UNSPECIFIED] * 8 + [pb.FINISH_REASON_LENGTH]
    assert [piece.HasField("usage") for piece in pieces] == [False] * 8 + [True]
    assert pieces[-1].usage == whole.usage
    for piece in (pieces[0], pieces[-1]):
        assert piece.served_by == whole.served_by and piece.request_id == "r"


def test_a_request_without_an_id_gets_one(running):
    ids = {running.generation.Generate(ask("x")).request_id for _ in range(2)}
    assert len(ids) == 2 and all(ids)


def test_equal_request_ids_at_the_same_time_do_not_disturb_each_other():
    with serving(FakeBackend(seconds_per_token=0.01)) as running, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(running.generation.Generate, ask(f"prompt {i}", request_id="same")) for i in range(8)]
        texts = [call.result(20).choices[0].text for call in calls]
        expected = {r.prompt_token_ids: expected_text(r) for r in running.backend.requests}
    tokens = [tuple(running.backend.tokenizer(f"prompt {i}")["input_ids"]) for i in range(8)]
    assert texts == [expected[ids] for ids in tokens]


def test_loaded_adapters_are_listed(running):
    found = running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest()).adapters
    assert [adapter.name for adapter in found] == ["trio", "pair"]
    trio, pair = found
    assert trio.digest == one_adapter().get("trio").digest
    assert (trio.base_model, trio.rank) == ("stand-in", 8)
    assert [(t.name, t.alpha, t.sparsity, list(t.trained_with)) for t in trio.tasks] == [
        ("math", 16.0, 0.75, []),
        ("nlu", 16.0, 0.75, ["math"]),
        ("code", 16.0, 0.75, ["math", "nlu"]),
    ]
    assert [task.name for task in pair.tasks] == ["nlu", "code"]
    # What is resident is what the files hold, but for their headers.
    files = (checkpoint_folder() / "tasks").glob("*.safetensors")
    headers = {file: 8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files}
    assert trio.resident_bytes == sum(file.stat().st_size - header for file, header in headers.items())
    assert running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="pair")).adapter == pair
    error = failure(lambda: running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="duo")))
    assert error.code() is CODES.NOT_FOUND and "choose from: trio, pair" in error.details()


# --- refusals


@pytest.mark.parametrize(
    ("request_fields", "code", "says"),
    [
        ({"adapter": "duo"}, CODES.NOT_FOUND, "choose from: trio, pair"),
        ({"tasks": ["art"]}, CODES.NOT_FOUND, "choose from: math, nlu, code"),
        ({"adapter_digest": "0" * 64}, CODES.FAILED_PRECONDITION, "has digest"),
        ({"adapter": ""}, CODES.INVALID_ARGUMENT, "several adapters are loaded"),
        ({"top_p": 7.0}, CODES.INVALID_ARGUMENT, "sampling.top_p"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_a_refusal_has_its_status(running, request_fields, code, says, method):
    before = len(running.backend.requests)
    if method == "Generate":
        error = failure(lambda: running.generation.Generate(ask("x", **request_fields)))
    else:
        error = failure(lambda: list(running.generation.StreamGenerate(ask_stream("x", **request_fields))))
    assert error.code() is code
    assert says in error.details()
    assert len(running.backend.requests) == before


@pytest.mark.parametrize("adapter", ["", "trio", "pair"])
def test_the_base_model_needs_no_adapters_name(running, adapter):
    """Several adapters are loaded, and it is the same beside each of them."""
    base = pb.TaskSelection(base=pb.Base())
    answer = running.generation.Generate(pb.GenerateRequest(adapter=adapter, prompt="x", task_selection=base))
    assert answer.served_by.adapter == adapter and not answer.served_by.tasks
    assert running.backend.requests[-1].task_set.is_base
    wrong = pb.GenerateRequest(adapter="duo", prompt="x", task_selection=base)
    assert failure(lambda: running.generation.Generate(wrong)).code() is CODES.NOT_FOUND
    other = pb.GenerateRequest(adapter_digest="0" * 64, prompt="x", task_selection=base)
    error = failure(lambda: running.generation.Generate(other))
    assert error.code() is CODES.FAILED_PRECONDITION and "no adapter is named" in error.details()


def test_every_violation_is_in_the_details(running):
    error = failure(lambda: running.generation.Generate(ask("", top_p=7.0, n=99, tasks=["nlu", "nlu"])))
    assert error.code() is CODES.INVALID_ARGUMENT
    found = violations(error)
    assert set(found) == {"prompt", "sampling.top_p", "sampling.n", "task_selection.tasks.tasks[1].name"}
    assert found["sampling.top_p"] == "7 is out of range → use a value greater than 0, at most 1"


@pytest.mark.parametrize("name", ["é" * 2000, "x" * 2000])
@pytest.mark.parametrize("count", [1, 500])
def test_a_long_refusal_is_shortened_so_that_it_arrives(running, name, count):
    """Beyond 8 kB of trailing metadata grpc puts RESOURCE_EXHAUSTED in place of the status."""
    tasks = {f"{name}{i}": 99.0 for i in range(count)}
    error = failure(lambda: running.generation.Generate(ask("x", tasks=tasks)))
    assert error.code() is CODES.INVALID_ARGUMENT
    assert metadata_bytes(error) < 8000
    found = violations(error)
    assert found["task_selection.tasks.tasks[0].weight"]
    if count == 1:
        assert "…" in found["task_selection.tasks.tasks[0].name"]
    else:
        assert "…" in error.details()
        assert len(found) - 1 + int(found[""].removeprefix("and ").removesuffix(" more")) == 2 * count
    error = failure(lambda: running.generation.Generate(ask("x", tasks=dict.fromkeys(tasks, 1.0))))
    assert error.code() is CODES.NOT_FOUND and "choose from: math, nlu, code" in error.details()
    assert metadata_bytes(error) < 8000


def test_a_field_that_the_backend_does_not_support_is_named():
    backend = FakeBackend()
    backend.unsupported = "min_p"
    with serving(backend) as running:
        error = failure(lambda: running.generation.Generate(ask("x", min_p=0.1)))
    assert error.code() is CODES.INVALID_ARGUMENT
    assert violations(error) == {"sampling.min_p": "min_p is not supported by the fake backend"}


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (LorafError(Problem("vLLM says no", "logprobs")), CODES.INVALID_ARGUMENT, "logprobs: vLLM says no"),
        (
            CorruptCheckpoint(Problem("changed", file="/srv/secret/ckpt/tasks/math.safetensors")),
            CODES.DATA_LOSS,
            "tasks/math.safetensors: changed",
        ),
    ],
)
def test_a_refusal_by_the_backend_keeps_its_text_but_not_the_servers_folders(raised, code, text):
    backend = FakeBackend()
    backend.failure = raised
    with serving(backend) as running:
        error = failure(lambda: running.generation.Generate(ask("x")))
    assert (error.code(), error.details()) == (code, text)


@pytest.mark.parametrize("after_tokens", [False, True])
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_an_internal_error_gives_the_client_only_its_request_id(caplog, after_tokens, method):
    backend = FakeBackend()
    fault = RuntimeError("no such file: /srv/secret/weights")
    backend.failure, backend.failure_after = (None, fault) if after_tokens else (fault, None)
    with serving(backend) as running, caplog.at_level(logging.ERROR):
        if method == "Generate":
            error = failure(lambda: running.generation.Generate(ask("x", request_id="r-1")))
        else:
            error = failure(lambda: list(running.generation.StreamGenerate(ask_stream("x", request_id="r-1"))))
    assert (error.code(), error.details()) == (CODES.INTERNAL, "request r-1")
    assert "secret" not in str(error.trailing_metadata())
    assert "request r-1 failed" in caplog.text and "/srv/secret/weights" in caplog.text and "Traceback" in caplog.text


def test_an_answer_without_a_finish_reason_is_an_internal_error():
    class Unfinished(FakeBackend):
        async def generate(self, request):
            async for output in super().generate(request):
                if not output.choices[0].finish_reason:
                    yield output

    with serving(Unfinished()) as running:
        assert failure(lambda: running.generation.Generate(ask("x"))).code() is CODES.INTERNAL


def test_a_cancellation_inside_the_backend_is_an_internal_error():
    class Cancelled(FakeBackend):
        async def generate(self, request):
            raise asyncio.CancelledError
            yield

    with serving(Cancelled()) as running:
        assert failure(lambda: running.generation.Generate(ask("x"))).code() is CODES.INTERNAL


def test_a_dead_engine_is_unavailable_and_internals_are_not_revealed():
    backend = FakeBackend()
    backend.failure = GONE
    with serving(backend) as running:
        error = failure(lambda: running.generation.Generate(ask("x")))
        assert error.code() is CODES.UNAVAILABLE
        assert "secret" not in error.details()
        assert running.client.health() == "NOT_SERVING"
        backend.failure = None
        assert failure(lambda: running.generation.Generate(ask("x"))).code() is CODES.UNAVAILABLE


# --- cancellation, deadlines


def test_no_headers_are_sent_before_the_first_token():
    """A client may retry, transparently, as long as it has seen no headers."""
    with serving(FakeBackend(seconds_per_token=0.5)) as running:
        began = time.monotonic()
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=2))
        call.initial_metadata()  # waits for the headers
        assert time.monotonic() - began > 0.4
        list(call)


@pytest.mark.parametrize("way", ["cancel", "deadline", "channel"])
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_the_backend_stops_at_once_when_the_client_disconnects(method, way, caplog):
    with serving(FakeBackend(seconds_per_token=0.1)) as running:
        timeout = 0.5 if way == "deadline" else None
        channel = grpc.insecure_channel(running.address)
        stub = type(running.generation)(channel)
        if method == "Generate":
            call = stub.Generate.future(ask("x", max_tokens=200), timeout=timeout)
        else:
            call = stub.StreamGenerate(ask_stream("x", max_tokens=200), timeout=timeout)
        assert eventually(lambda: len(running.backend.running) == 1)
        if way == "cancel":
            call.cancel()
        elif way == "channel":
            channel.close()
        assert eventually(lambda: not running.backend.running, 2.0)
        assert len(running.backend.closed_early) == 1
        assert eventually(lambda: call.code() in (CODES.CANCELLED, CODES.DEADLINE_EXCEEDED))
        assert call.code() is (CODES.DEADLINE_EXCEEDED if way == "deadline" else CODES.CANCELLED)
        channel.close()
        assert running.generation.Generate(ask("x", max_tokens=1)).choices  # its place is free again
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Wordy(FakeBackend):
    """A megabyte a token."""

    def _piece(self, request, index, place):
        piece = super()._piece(request, index, place)
        return type(piece)(piece.index, piece.text * (1 << 20), piece.token_ids, piece.finish_reason)


def test_an_unread_stream_keeps_its_place_until_its_client_disconnects():
    """The handler waits for the client to read then, not in the backend."""
    with serving(Wordy(), max_queue=1) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=8))
        assert eventually(lambda: len(running.backend.requests) == 1 and not running.backend.running)
        assert failure(lambda: running.generation.Generate(ask("x"))).code() is CODES.RESOURCE_EXHAUSTED
        call.cancel()
        assert eventually(lambda: running.server._admission.in_flight == 0, 2.0)
        assert running.generation.Generate(ask("x", max_tokens=1)).choices


def test_a_stream_that_nobody_reads_ends_when_too_much_waits():
    with serving(Wordy()) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=200))
        assert eventually(lambda: running.backend.closed_early)
        assert eventually(lambda: running.server._admission.in_flight == 0, 2.0)
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is CODES.RESOURCE_EXHAUSTED
        assert "8,388,608 bytes of the answer wait for the client" in error.value.details()


def test_a_client_that_stops_reading_does_not_keep_its_place_for_ever(monkeypatch):
    monkeypatch.setattr(outbox, "STALL_SECONDS", 0.3)
    with serving(Wordy(), max_queue=1) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=8))
        assert eventually(lambda: running.server._admission.in_flight == 1)
        assert eventually(lambda: running.server._admission.in_flight == 0)
        with pytest.raises(grpc.RpcError, match="the client has read nothing for 0.3 s"):
            list(call)


def test_the_default_deadline_applies_to_requests_without_one():
    with serving(FakeBackend(seconds_per_token=0.1), default_deadline=0.3) as running:
        error = failure(lambda: running.generation.Generate(ask("x", max_tokens=100)))
        assert error.code() is CODES.DEADLINE_EXCEEDED
        assert "default deadline of 0.3 s" in error.details()
        assert not running.backend.running
        assert running.generation.Generate(ask("x", max_tokens=5), timeout=10).choices


def test_a_timeout_inside_the_backend_is_an_internal_error():
    backend = FakeBackend()
    backend.failure = TimeoutError("inside")
    with serving(backend, default_deadline=60.0) as running:
        assert failure(lambda: running.generation.Generate(ask("x"))).code() is CODES.INTERNAL
