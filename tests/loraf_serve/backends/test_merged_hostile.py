"""No request ends the merged backend: it is refused or fails alone, and other clients do not notice."""

from __future__ import annotations

import logging

import pytest

from loraf_serve.backends import merged_engine
from loraf_serve.backends.sampler import Sampler
from loraf_serve.client import ServiceError
from loraf_serve.request.prompts import PromptReader
from tests.loraf_serve.hostile_requests import CONTROL, odd_server, run_campaign
from tests.loraf_serve.odd_models import BEYOND, ODD_MODELS

REQUESTS = 150


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    with odd_server("merged", tmp_path_factory.mktemp("odd")) as running:
        yield running


def stream_around(running, action) -> list[str]:
    """Runs `action` while another client's stream runs. Returns the stream's finish reasons."""
    stream = running.client.stream(**CONTROL | {"max_tokens": 150})
    pieces = [next(stream)]
    action()
    return [piece.finish_reason for piece in (*pieces, *stream) if piece.finish_reason]


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"prompt": f"a{BEYOND[0]}"}, "prompt"),
        ({"prompt": f"a{BEYOND[-1]}"}, "prompt"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"prompt_token_ids": [16]}, "prompt_token_ids.ids[0]"),
        ({"prompt": "a", "logprobs": 17}, "sampling.logprobs"),
        ({"prompt": "a", "stop_token_ids": [16]}, "sampling.stop_token_ids[0]"),
        ({"prompt": "a", "logit_bias": {64: 1.0}}, "sampling.logit_bias[64]"),
        ({"prompt": "a", "min_tokens": 2, "stop_token_ids": range(16)}, "sampling.stop_token_ids"),
    ],
)
def test_a_request_that_the_model_cannot_hold_is_refused_and_nobody_else_notices(odd, request_fields, field):
    def refused() -> None:
        with pytest.raises(ServiceError) as error:
            odd.client.generate(**request_fields)
        assert error.value.code == "INVALID_ARGUMENT"
        assert [name for name, _ in error.value.violations] == [field]

    assert stream_around(odd, refused) == ["length"]
    assert odd.client.health() == "SERVING"


@pytest.mark.parametrize("fields", [{"min_tokens": 4}, {"min_tokens": 4, "ignore_eos": True}, {"ignore_eos": True}])
def test_end_tokens_beyond_the_vocabulary_do_no_harm(odd, fields):
    assert odd.client.generate("a", base=True, max_tokens=4, logprobs=16, top_k=10**6, **fields).text is not None
    assert odd.backend.end_tokens == {2}


def test_end_tokens_beyond_the_vocabulary_are_reported_at_start(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), odd_server("merged", tmp_path) as running:
        assert running.client.health() == "SERVING"
    assert "generation_config.json: end tokens beyond the model's vocabulary of 16 are ignored: 16" in caplog.text


@pytest.mark.parametrize("place", ["tokenizing", "prefill", "sampling"])
def test_a_fault_within_a_request_fails_that_request_alone(odd, monkeypatch, place):
    def wrap(owner, name):
        """Makes a function fail for the prompt «bad», and only for that."""
        original = getattr(owner, name)

        def maybe(*args, **kwargs):
            if "bad" in args or any(isinstance(each, tuple) and each == (1, 4, 3, 6) for each in args):
                raise ZeroDivisionError("a fault")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, maybe)

    places = {
        "tokenizing": (PromptReader, "_encode"),
        "prefill": (merged_engine, "Prefill"),
        "sampling": (Sampler, "__init__"),
    }
    wrap(*places[place])

    def fails() -> None:
        with pytest.raises(ServiceError) as error:
            odd.client.generate("bad", base=True)
        assert error.value.code == "INTERNAL"

    assert stream_around(odd, fails) == ["length"]
    assert odd.client.health() == "SERVING"
    assert odd.client.generate(**CONTROL).token_ids


def test_random_requests_are_answered_or_refused(odd):
    result = run_campaign(odd.client, REQUESTS, seed=1)
    assert not result.faults
    assert min(result.outcomes["OK"], result.outcomes["INVALID_ARGUMENT"]) > REQUESTS / 5
    assert result.streams > 0


def test_random_requests_to_a_model_with_more_tokens_than_its_tokenizer(tmp_path):
    name = "model beyond the tokenizer"
    with odd_server("merged", tmp_path, name) as running:
        result = run_campaign(running.client, REQUESTS, 3, ODD_MODELS[name])
    assert not result.faults
    assert min(result.outcomes["OK"], result.outcomes["INVALID_ARGUMENT"]) > REQUESTS / 5
    assert result.streams > 0
