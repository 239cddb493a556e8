"""No request ends a vLLM engine: it is refused or answered, and other clients do not notice.

The pool's models have ordinary tokenizers, so this file starts two engines of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from loraf_serve.client import ServiceError
from tests.loraf_serve.hostile_requests import CONTROL, odd_server, run_campaign
from tests.loraf_serve.odd_models import BEYOND, ODD_MODELS

REQUESTS = 100


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    with odd_server("resident", tmp_path_factory.mktemp("odd")) as running:
        yield running


def test_end_tokens_beyond_the_vocabulary_never_reach_vllm(odd):
    assert odd.backend.vocab_size == 16 and odd.backend.end_tokens == {2}
    for fields in ({"min_tokens": 4}, {"min_tokens": 4, "ignore_eos": True}, {"logprobs": 16, "top_k": 10**6}):
        assert odd.client.generate("abc", base=True, max_tokens=4, **fields).token_ids
    assert odd.client.health() == "SERVING"


@pytest.mark.parametrize("token", [BEYOND[0], BEYOND[-1]])
def test_text_with_a_token_beyond_the_model_is_refused_while_another_client_streams(odd, token):
    stream = odd.client.stream(**CONTROL | {"max_tokens": 150})
    next(stream)
    with pytest.raises(ServiceError, match=f"token '{token}'") as error:
        odd.client.generate(f"ab{token}", base=True)
    assert error.value.code == "INVALID_ARGUMENT"
    assert [piece.finish_reason for piece in stream][-1] == "length"
    assert odd.client.health() == "SERVING"


def test_random_requests_are_answered_or_refused(odd):
    result = run_campaign(odd.client, REQUESTS, seed=2)
    assert not result.faults
    assert min(result.outcomes["OK"], result.outcomes["INVALID_ARGUMENT"]) > REQUESTS / 5
    assert result.streams > 0


def test_random_requests_to_slots_and_a_model_with_more_tokens_than_its_tokenizer(tmp_path):
    name = "model beyond the tokenizer"
    with odd_server("slots", tmp_path, name) as running:
        result = run_campaign(running.client, REQUESTS, 4, ODD_MODELS[name])
    assert not result.faults
    assert min(result.outcomes["OK"], result.outcomes["INVALID_ARGUMENT"]) > REQUESTS / 5
    assert result.streams > 0


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "kept"),
    [([2, 16, 400, -1], 2, {2}), (16, 16, set()), (None, 400, set()), ([3, 64], None, {3}), (15, 2, {2, 15})],
)
def test_vllms_own_reading_brings_no_end_token_back(configured, of_tokenizer, kept):
    from vllm.sampling_params import SamplingParams

    from loraf_serve.vllm.engine.vllm_backend import _keep_ends_within

    processor = SimpleNamespace(generation_config_fields={} if configured is None else {"eos_token_id": configured})
    renderer = SimpleNamespace(get_eos_token_id=lambda: of_tokenizer)
    assert _keep_ends_within(SimpleNamespace(input_processor=processor, renderer=renderer), 16) == kept
    params = SamplingParams(min_tokens=2, max_tokens=4, stop_token_ids=[5])
    params.update_from_generation_config(processor.generation_config_fields, renderer.get_eos_token_id())
    assert params.all_stop_token_ids == kept | {5}
