"""The campaigns of benchmarks/campaigns/, briefly, on the fake backend in a process of its own.

tests/loraf_serve/vllm/test_campaigns.py runs two of them on an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.campaigns import cancels, generated_requests, http_cost, saturation, service_cost, streams
from benchmarks.campaigns.attacks import ATTACKS, damaged, valid_bytes
from benchmarks.campaigns.calls import Outcome
from benchmarks.campaigns.frames import GENERATE, Connection
from benchmarks.campaigns.questions import SELECTIONS, is_same, make_questions
from benchmarks.campaigns.stand import CampaignServer, campaign_server
from loraf_serve.client import request_of
from loraf_serve.http.asked import read_completion as asked_over_http
from loraf_serve.v1 import generation_pb2 as pb


@pytest.fixture(scope="module")
def server() -> Iterator[CampaignServer]:
    with campaign_server("fake", seconds_per_token=0.005, max_queue=96) as running:
        yield running


def test_many_streams_are_neither_mixed_nor_lost(server):
    result = asyncio.run(streams.run_campaign(server, streams=64, lengths=(10, 30)))
    assert not result["faults"]
    assert result["as alone"] == 64 and result["most in flight in the server"] > 32
    assert result["different answers alone"] > 50


def test_a_mixed_or_unfinished_answer_would_be_found():
    alone = Outcome(text="ab", token_ids=[1, 2], finished=True)
    assert is_same(Outcome(text="ab", token_ids=[1, 2], finished=True), alone)
    for other in (
        Outcome(text="ac", token_ids=[1, 3], finished=True),
        Outcome(text="ab", token_ids=[1, 2]),
        Outcome("UNAVAILABLE", text="ab", token_ids=[1, 2], finished=True),
    ):
        assert not is_same(other, alone)


def test_questions_ask_one_prompt_with_every_set():
    questions = make_questions(2 * len(SELECTIONS), seed=1, prefix=5)
    prompts = {tuple(question.prompt_token_ids.ids) for question in questions}
    assert len(prompts) == 2 and len({prompt[:6] for prompt in prompts}) == 1
    assert len({str(question.task_selection) + question.adapter for question in questions}) == len(SELECTIONS)


def test_cancelled_requests_leave_nothing(server):
    result = asyncio.run(cancels.run_campaign(server, "fake", count=60))
    assert not result["faults"]
    assert {f"decode, {way}" for way in cancels.WAYS} <= set(result["where and how"])


def test_a_request_that_is_left_would_be_found(server):
    connection = Connection(server.address)
    connection.open()
    body = request_of(pb.GenerateRequest, "x", adapter="trio", max_tokens=200).SerializeToString()
    connection.call(GENERATE, body)
    connection.wait(0.3)
    state = server.state()
    connection.kill()
    assert state["admission"] == state["leases"] == state["engine"] == 1


def test_a_saturated_server_answers_right_and_does_not_grow(server):
    result = asyncio.run(saturation.run_campaign(server, seconds=6, rate=150))
    assert not result["faults"]
    assert result["calls"] > 200 and set(result["outcomes"]) >= {"stream", "cancel", "invalid", "load", "unload"}


def test_growth_is_from_the_second_minute_to_the_last():
    grown = [(at, round(1e9 + 1e6 * at), 0) for at in range(0, 600, 5)]
    assert saturation.growth(grown, 600)["resident MB grown"] == pytest.approx(420, abs=5)


def test_generated_requests_are_answered_or_refused_with_their_field(server):
    result = generated_requests.run_campaign(server, count=300, connections=30)
    assert not result["faults"]
    assert result["requests"] >= 300 and min(result["outcomes"][code] for code in ("OK", "INVALID_ARGUMENT")) > 50
    assert result["kinds of mistakes"] > 40 and result["kinds of attacks"] == 30


def test_damaged_bytes_are_other_bytes():
    import random

    data = valid_bytes(b"body")
    assert damaged(data, random.Random(3)) != data
    assert len(ATTACKS) >= 75


def test_the_cost_of_the_service_is_taken_within_a_round():
    def measured(speed: float, first: float) -> dict[str, float]:
        return {"tokens a second": speed, "first token": first}

    rounds = [
        {"in process": measured(100, 0.020), "over gRPC": measured(98, 0.022)},
        {"in process": measured(50, 0.040), "over gRPC": measured(49, 0.041)},
    ]
    result = service_cost.compare(rounds)
    assert result["share of the throughput"]["median"] == pytest.approx(0.98)
    assert result["ms more to the first token"]["median"] == pytest.approx(1.5)


def test_both_ways_ask_for_the_same():
    message = service_cost.request("t1:0.5+t0", [1, 2], 7)
    tasks = [(task.name, task.weight) for task in message.task_selection.tasks.tasks]
    assert tasks == [("t0", 1.0), ("t1", 0.5)]
    assert (message.sampling.temperature, message.sampling.max_tokens, message.sampling.ignore_eos) == (0.0, 7, True)


def test_both_doors_are_asked_for_the_same():
    body = http_cost.body_of("t1:0.5+t0", [1, 2], 7, stream=True)
    asked = asked_over_http(body)
    message = service_cost.request("t1:0.5+t0", [1, 2], 7)
    (request,) = asked.requests
    assert request.sampling == message.sampling and request.prompt_token_ids == message.prompt_token_ids
    assert asked.name.adapter == message.adapter and dict(asked.name.written.pairs) == {"t0": 1.0, "t1": 0.5}
    assert asked.stream


def test_the_cost_of_http_is_taken_within_a_round():
    rounds = [
        {"gRPC": {"tokens a second": speed, "first piece": 0.1}, "HTTP": {"tokens a second": s, "first piece": 0.102}}
        for speed, s in ((100, 97), (50, 48.5))
    ]
    result = http_cost.compare(rounds)
    assert result["share of the throughput"]["median"] == pytest.approx(0.97)
    assert result["ms more to the first piece"]["median"] == pytest.approx(2)
