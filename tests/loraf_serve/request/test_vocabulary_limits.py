"""Every id and number of a request is checked against the model, wherever it comes from."""

from __future__ import annotations

import pytest

from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.client import request_of
from loraf_serve.errors import InvalidRequest
from loraf_serve.request import sampling
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.odd_models import BEYOND, ODD_VOCAB_SIZE, odd_tokenizer

LAST = ODD_VOCAB_SIZE - 1


def odd_validator(vocab_size: int | None = None, of_backend: int | None = ODD_VOCAB_SIZE) -> Validator:
    backend = FakeBackend()
    backend.tokenizer, backend.vocab_size, backend.end_tokens = odd_tokenizer(), of_backend, frozenset({2})
    return Validator(backend, vocab_size)


@pytest.fixture(scope="module")
def validator():
    return odd_validator()


def read(validator: Validator, *args, **kwargs) -> GenerationRequest:
    return validator.read_now(request_of(pb.GenerateRequest, *args, base=True, **kwargs), Registry())


def refusal(validator: Validator, *args, **kwargs) -> tuple[str, str]:
    """(field, message) of the only problem with a request."""
    with pytest.raises(InvalidRequest) as error:
        read(validator, *args, **kwargs)
    (problem,) = error.value.problems
    return problem.field, problem.message


@pytest.mark.parametrize("number", [0, len(BEYOND) - 1])
def test_text_with_a_token_beyond_the_model_is_refused_by_name(validator, number):
    field, message = refusal(validator, f"ab{BEYOND[number]}c")
    assert field == "prompt"
    token_id = ODD_VOCAB_SIZE + number
    assert message == f"has the token '{BEYOND[number]}' (id {token_id}), but the model's vocabulary has 16 tokens"


def test_a_message_with_a_token_beyond_the_model_is_refused(validator):
    field, message = refusal(validator, messages=[{"role": "user", "content": f"a{BEYOND[3]}"}])
    assert field == "messages" and BEYOND[3] in message


def test_a_chat_template_that_writes_a_token_beyond_the_model_is_refused(validator):
    assert read(validator, messages=[{"role": "user", "content": "a"}]).prompt_token_ids == (1, 3)
    field, message = refusal(validator, messages=[{"role": "system", "content": "a"}])
    assert field == "messages" and f"{BEYOND[-1]!r} (id 115)" in message


def test_a_bos_beyond_the_model_is_refused_and_not_passed_on():
    validator = odd_validator(of_backend=1)  # only <pad>
    assert refusal(validator, "a") == ("prompt", "has the token '<s>' (id 1), but the model's vocabulary has 1 tokens")


def test_the_last_token_is_accepted_and_the_next_refused(validator):
    assert read(validator, prompt_token_ids=[LAST]).prompt_token_ids == (LAST,)
    assert refusal(validator, prompt_token_ids=[LAST, ODD_VOCAB_SIZE])[0] == "prompt_token_ids.ids[1]"


@pytest.mark.parametrize(
    ("of_server", "of_backend", "size"),
    [(16, 16, 16), (320, 16, 16), (16, 320, 16), (None, 16, 16), (16, None, 16), (None, None, 116)],
)
def test_the_smaller_vocabulary_counts_and_the_tokenizers_only_without_any(of_server, of_backend, size):
    validator = odd_validator(of_server, of_backend)
    assert read(validator, prompt_token_ids=[size - 1]).prompt_token_ids == (size - 1,)
    assert refusal(validator, prompt_token_ids=[size])[0] == "prompt_token_ids.ids[0]"


# --- sampling


@pytest.mark.parametrize(
    ("allowed", "refused", "field"),
    [
        ({"logprobs": 16}, {"logprobs": 17}, "sampling.logprobs"),
        ({"stop_token_ids": [LAST]}, {"stop_token_ids": [0, 16]}, "sampling.stop_token_ids[1]"),
        ({"logit_bias": {LAST: 1.0}}, {"logit_bias": {16: 1.0}}, "sampling.logit_bias[16]"),
        ({"stop_token_ids": range(16)}, {"stop_token_ids": range(16), "min_tokens": 1}, "sampling.stop_token_ids"),
        (
            {"stop_token_ids": range(3, 16), "min_tokens": 1},
            {"stop_token_ids": [0, 1, *range(3, 16)], "min_tokens": 1},  # with the end token, all
            "sampling.stop_token_ids",
        ),
    ],
)
def test_the_last_value_that_the_model_can_hold_is_accepted_and_the_next_refused(validator, allowed, refused, field):
    assert read(validator, "a", **allowed)
    with pytest.raises(InvalidRequest, match="16|0 to 15") as error:  # the limit
        read(validator, "a", **refused)
    assert [problem.field for problem in error.value.problems] == [field]


@pytest.mark.parametrize(("logprobs", "message"), [(17, "17 is more than the model's 16 tokens"), (21, "out of range")])
def test_log_probabilities_are_limited_once_by_the_model_and_once_for_all(validator, logprobs, message):
    assert message in refusal(validator, "a", logprobs=logprobs)[1]


@pytest.mark.parametrize(("top_k", "becomes"), [(15, 15), (16, 0), (17, 0), (2**31 - 1, 0), (0, 0), (-1, 0)])
def test_a_top_k_that_keeps_every_token_is_off(top_k, becomes):
    assert sampling.read(pb.SamplingParams(top_k=top_k), ODD_VOCAB_SIZE).top_k == becomes
