"""Forms of answers, bad words and priorities are read, or every mistake is named."""

from __future__ import annotations

import json
import time

import pytest

from loraf_serve import limits
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.client import request_of
from loraf_serve.errors import InvalidRequest
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend


@pytest.fixture(scope="module")
def validator():
    return Validator(FakeBackend(), 320)


def read(validator: Validator, **fields) -> GenerationRequest:
    return validator.read_now(request_of(pb.GenerateRequest, "x", base=True, **fields), Registry())


@pytest.mark.parametrize(
    ("form", "kind", "value"),
    [
        ({"json_schema": {"type": "integer"}}, "json_schema", '{"type": "integer"}'),
        ({"regex": "a+|b"}, "regex", "a+|b"),
        ({"choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"choice": ["x" * 64] + [str(i) for i in range(limits.MAX_CHOICES - 1)]}, "choice", None),
    ],
)
def test_a_form_reaches_the_backend(validator, form, kind, value):
    found = read(validator, **form).sampling.structured_output
    assert found.kind == kind and value in (None, found.value)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"structured_output": pb.StructuredOutput()}, "form", "is empty"),
        ({"json_schema": ""}, "json_schema", "is empty"),
        ({"json_schema": "{"}, "json_schema", "not valid JSON"),
        ({"json_schema": "true"}, "json_schema", "not a JSON object"),
        ({"json_schema": '{"a": Infinity}'}, "json_schema", "Infinity"),
        ({"json_schema": '{"a": 1' + "0" * 5000 + "}"}, "json_schema", "not valid JSON"),
        ({"json_schema": '{"a":' * 65 + "1" + "}" * 65}, "json_schema", "64 levels"),
        ({"json_schema": json.dumps({"title": "x" * limits.MAX_SCHEMA})}, "json_schema", "characters"),
        ({"json_schema": '{"type": "number", "minimum": 1e400}'}, "json_schema", "1e400 is too large"),
        ({"json_schema": '{"const": -1e400}'}, "json_schema", "-1e400 is too large"),
        ({"regex": "a\0b"}, "regex", "null character"),
        ({"regex": "a" * (limits.MAX_REGEX + 1)}, "regex", "characters"),
        ({"grammar": "  \n"}, "grammar", "is empty"),
        ({"grammar": "a" * (limits.MAX_GRAMMAR + 1)}, "grammar", "characters"),
        ({"choice": []}, "choice.texts", "has 0 texts"),
        ({"choice": [str(i) for i in range(257)]}, "choice.texts", "has 257 texts"),
        ({"choice": ["x" * limits.MAX_CHOICES_CHARACTERS, "y"]}, "choice.texts", "characters"),
        ({"choice": ["a", ""]}, "choice.texts[1]", "is empty"),
        ({"choice": ["a", "b", "a"]}, "choice.texts[2]", "there twice"),
    ],
)
def test_a_wrong_form_is_named(validator, fields, field, says):
    with pytest.raises(InvalidRequest) as error:
        read(validator, **fields)
    (problem,) = error.value.problems
    assert problem.field == f"sampling.structured_output.{field}"
    assert says in problem.message and problem.remedy


def fields_of_refusal(validator: Validator, **fields) -> list[str]:
    with pytest.raises(InvalidRequest) as error:
        read(validator, **fields)
    return sorted(problem.field for problem in error.value.problems)


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
def test_a_form_says_itself_when_the_answer_ends(validator, field):
    assert fields_of_refusal(validator, regex="a", **{field: 1}) == [f"sampling.{field}"]
    assert read(validator, regex="a", **{field: 0})


def test_a_form_needs_a_token_that_ends_the_answer():
    backend = FakeBackend()
    backend.end_tokens = frozenset()
    assert fields_of_refusal(Validator(backend), regex="a") == ["sampling.structured_output"]


def test_fields_that_the_backend_does_not_support_are_named_with_it():
    backend = FakeBackend()
    backend.unsupported_fields = ("sampling.structured_output", "priority", "sampling.bad_words")
    validator = Validator(backend)
    assert fields_of_refusal(validator, regex="a", priority=1) == ["priority", "sampling.structured_output"]
    with pytest.raises(InvalidRequest, match=r"fake backend → .*--scheduling-policy priority"):
        read(validator, priority=-1)
    assert read(validator, priority=0).priority == 0


def test_a_form_that_the_backend_does_not_support_is_not_read():
    backend = FakeBackend()
    backend.unsupported_fields = ("sampling.structured_output",)
    assert fields_of_refusal(Validator(backend), json_schema="{") == ["sampling.structured_output"]
    found = fields_of_refusal(Validator(backend), json_schema="{", top_p=2.0)
    assert found == ["sampling.structured_output", "sampling.top_p"]


def test_an_expression_is_left_to_the_backend(validator):
    slow = "(?i)" + "[\u012c-\uffff]" * 800  # Python takes many seconds to compile it
    began = time.monotonic()
    assert read(validator, regex=slow).sampling.structured_output.value == slow
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("priority", [-1000, -1, 0, 1000])
def test_a_priority_reaches_the_backend(validator, priority):
    assert read(validator, priority=priority).priority == priority


@pytest.mark.parametrize("priority", [-1001, 1001, 2**31 - 1, -(2**31)])
def test_a_priority_out_of_range_is_named(validator, priority):
    assert fields_of_refusal(validator, priority=priority) == ["priority"]


def test_bad_words_reach_the_backend_once_each(validator):
    assert read(validator, bad_words=["a", "b c", "a"]).sampling.bad_words == ("a", "b c")


@pytest.mark.parametrize(
    ("words", "field", "says"),
    [
        ([""], "[0]", "has 0 characters"),
        (["a", "   "], "[1]", "has no tokens"),
        (["x" * 257], "[0]", "has 257 characters"),
        ([str(i) for i in range(65)], "", "has 65 texts"),
        (["x" * 250] * 3 + ["y" * 250, "z" * 250], "", "tokens"),
    ],
)
def test_a_wrong_bad_word_is_named(validator, words, field, says):
    with pytest.raises(InvalidRequest) as error:
        read(validator, bad_words=words)
    (problem,) = error.value.problems
    assert problem.field == f"sampling.bad_words{field}" and says in problem.message


def test_a_bad_word_with_a_token_beyond_the_model_is_named():
    tokenizer = FakeBackend().tokenizer
    last = max(tokenizer.encode("az", add_special_tokens=False))
    assert fields_of_refusal(Validator(FakeBackend(), last), bad_words=["a", "az"]) == ["sampling.bad_words[1]"]
    assert read(Validator(FakeBackend(), last + 1), bad_words=["a", "az"])
