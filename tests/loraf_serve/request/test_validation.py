"""Requests become what the client meant, or every mistake is named."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.errors import UnknownTask
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import GenerationRequest, Sampling
from loraf_serve.client import request_of
from loraf_serve.errors import DigestMismatch, InvalidRequest
from loraf_serve.request import prompts, sampling
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import VOCAB_SIZE, one_adapter, two_adapters
from tests.standins import byte_tokenizer
from tests.tools import needs

TRIO = ("math", "nlu", "code")


@pytest.fixture(scope="module")
def validator():
    return Validator(FakeBackend(), VOCAB_SIZE)


def read(validator: Validator, *args, registry: Registry | None = None, **kwargs) -> GenerationRequest:
    known = one_adapter() if registry is None else registry
    return validator.read_now(request_of(pb.GenerateRequest, *args, **kwargs), known)


def fields(error: pytest.ExceptionInfo) -> set[str]:
    return {problem.field for problem in error.value.problems}


# --- prompts


def test_a_prompt_is_tokenized_as_transformers_does_it(validator):
    expected = byte_tokenizer()("2 + 3 =")["input_ids"]
    assert read(validator, "2 + 3 =").prompt_token_ids == tuple(expected)


def test_a_chat_goes_through_the_template_and_has_one_bos(validator):
    chat = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hello"}]
    tokenizer = byte_tokenizer()
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    found = read(validator, messages=chat).prompt_token_ids
    assert found == tuple(expected)
    assert found.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(found).endswith("assistant: ")


def test_token_ids_may_exceed_the_tokenizers_but_not_the_models(validator):
    assert len(byte_tokenizer()) < VOCAB_SIZE
    assert read(validator, prompt_token_ids=[5, VOCAB_SIZE - 1]).prompt_token_ids == (5, VOCAB_SIZE - 1)


@pytest.mark.parametrize(
    ("request_fields", "field", "says"),
    [
        ({}, "input", "prompt, messages or prompt_token_ids"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"messages": []}, "messages.messages", "empty"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages.messages[0].role", "empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "no tokens"),
        ({"prompt_token_ids": [1, 2, VOCAB_SIZE]}, "prompt_token_ids.ids[2]", "vocabulary"),
        (
            {"prompt_token_ids": [5] * 256},
            "prompt_token_ids",
            "256 tokens, and the limit for prompt and answer together is 256",
        ),
        ({"prompt": "x" * 255}, "prompt", "256 tokens"),
        ({"request_id": "a\nb", "prompt": "x"}, "request_id", "printed"),
        ({"request_id": "a" * 129, "prompt": "x"}, "request_id", "128"),
    ],
)
def test_a_wrong_input_is_named(validator, request_fields, field, says):
    with pytest.raises(InvalidRequest) as error:
        read(validator, **request_fields)
    assert fields(error) == {field}
    assert says in str(error.value)


def test_the_longest_prompt_leaves_room_for_one_token(validator):
    assert read(validator, "x" * 254).sampling.max_tokens == 1
    assert read(validator, "x" * 250, max_tokens=100).sampling.max_tokens == 5
    assert read(validator, "x" * 250, max_tokens=3).sampling.max_tokens == 3
    with pytest.raises(InvalidRequest) as error:
        read(validator, "x" * 250, max_tokens=100, min_tokens=6)
    assert fields(error) == {"sampling.min_tokens"}


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    reader = prompts.PromptReader(byte_tokenizer(), 256, VOCAB_SIZE)
    monkeypatch.setattr(reader, "_tokenizer", None)  # any use of it fails
    with pytest.raises(InvalidRequest, match="at least 200000 tokens"):
        reader.read(request_of(pb.GenerateRequest, "x" * 1_000_000), None)


def test_without_a_chat_template_messages_are_refused_with_a_remedy():
    backend = FakeBackend()
    backend.tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template → send prompt") as error:
        read(Validator(backend), messages=[{"role": "user", "content": "x"}])
    assert fields(error) == {"messages"}


def test_messages_that_the_chat_template_refuses_are_invalid():
    backend = FakeBackend()
    backend.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        read(Validator(backend), messages=[{"role": "user", "content": "x"}])


# --- the task's template


@pytest.mark.parametrize("selection", [{"tasks": ["math"]}, {"as_trained": "math"}, {"tasks": {"math": 0.5}}])
def test_the_prompt_is_wrapped_as_the_one_chosen_task_was_trained(validator, selection):
    found = read(validator, "1 + {1}", apply_task_template=True, **selection).prompt_token_ids
    assert byte_tokenizer().decode(found, skip_special_tokens=True) == "Q: 1 + {1}\nA:"


@pytest.mark.parametrize(
    ("request_fields", "says"),
    [
        ({"prompt": "x", "tasks": ["math", "nlu"]}, "exactly one task"),
        ({"prompt": "x"}, "exactly one task"),
        ({"prompt": "x", "base": True}, "exactly one task"),
        ({"prompt_token_ids": [5], "tasks": ["math"]}, "requires a prompt"),
        ({"prompt": "x", "tasks": ["nlu"]}, "2 fields (instruction, input)"),
        ({"prompt": "x", "as_trained": "code"}, "0 fields (none)"),
    ],
)
def test_a_template_that_cannot_be_applied_is_refused(validator, request_fields, says):
    with pytest.raises(InvalidRequest) as error:
        read(validator, apply_task_template=True, **request_fields)
    assert fields(error) == {"apply_task_template"}
    assert says in str(error.value)


@pytest.mark.parametrize(
    "template", ["{a.__class__}", "{a[0]}", "{}", "{0}", "{a!r}", "{a:>99999999999}", "{a", "{a} {b}"]
)
def test_templates_that_do_more_than_insert_the_prompt_are_refused(template):
    with pytest.raises(InvalidRequest):
        prompts.fill(template, "x")


def test_a_template_may_use_its_field_twice_and_hold_braces():
    assert prompts.fill("{{}} {a} and {a}", "{b}") == "{} {b} and {b}"


# --- the selection


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, "math+nlu+code"),
        ({"tasks": ["code", "math"]}, "math+code"),
        ({"tasks": {"nlu": 0.5, "math": -2.0}}, "math:-2.0+nlu:0.5"),
        ({"tasks": {"nlu": 1.0, "math": 0.0}}, "nlu"),
        ({"tasks": {"nlu": 0.0}}, "base"),
        ({"tasks": {"nlu": 16.0}}, "nlu:16.0"),
        ({"as_trained": "math"}, "math"),
        ({"as_trained": "nlu"}, "math+nlu"),
        ({"base": True}, "base"),
    ],
)
def test_a_selection_becomes_its_set_in_canonical_order(validator, selection, expected):
    found = read(validator, "x", **selection)
    assert str(found.task_set) == expected
    assert found.adapter.name == "trio"


@pytest.mark.parametrize(
    ("selection", "error", "field", "says"),
    [
        ({"tasks": []}, InvalidRequest, "task_selection.tasks.tasks", "names no task"),
        ({"tasks": ["nlu", "nlu"]}, InvalidRequest, "task_selection.tasks.tasks[1].name", "twice"),
        ({"tasks": {"nlu": math.nan}}, InvalidRequest, "task_selection.tasks.tasks[0].weight", "nan"),
        ({"tasks": {"nlu": math.inf}}, InvalidRequest, "task_selection.tasks.tasks[0].weight", "inf"),
        ({"tasks": {"nlu": -16.5}}, InvalidRequest, "task_selection.tasks.tasks[0].weight", "-16.5"),
        ({"tasks": ["art"]}, UnknownTask, "task_selection.tasks.tasks[0].name", "choose from: math, nlu, code"),
        ({"tasks": ["base"]}, UnknownTask, "task_selection.tasks.tasks[0].name", "no task 'base'"),
        ({"as_trained": "art"}, UnknownTask, "task_selection.as_trained.name", "choose from: math, nlu, code"),
        ({"adapter": "duo"}, UnknownTask, "adapter", "choose from: trio"),
        ({"adapter_digest": "0" * 64}, DigestMismatch, "adapter_digest", "has digest"),
    ],
)
def test_a_wrong_selection_is_named(validator, selection, error, field, says):
    with pytest.raises(error) as found:
        read(validator, "x", **selection)
    assert type(found.value) is error
    assert fields(found) == {field}
    assert says in str(found.value)


def test_an_empty_selection_is_refused(validator):
    request = request_of(pb.GenerateRequest, "x")
    request.task_selection.SetInParent()
    with pytest.raises(InvalidRequest) as error:
        validator.read_now(request, one_adapter())
    assert fields(error) == {"task_selection.selection"}


def test_with_several_adapters_one_must_be_named(validator):
    several = two_adapters()
    for selection in ({}, {"tasks": ["nlu"]}, {"as_trained": "nlu"}, {"named": "nlu"}):
        with pytest.raises(InvalidRequest, match="choose from: trio, pair") as error:
            read(validator, "x", registry=several, **selection)
        assert fields(error) == {"adapter"}
    base = read(validator, "x", registry=several, base=True)  # the same beside each of them
    assert base.adapter is None and base.task_set.is_base
    assert str(read(validator, "x", registry=several, adapter="pair").task_set) == "nlu+code"
    # `pair` was loaded without math, on top of which nlu was trained.
    with pytest.raises(UnknownTask, match="on top of math"):
        read(validator, "x", registry=several, adapter="pair", as_trained="nlu")
    with pytest.raises(UnknownTask, match="choose from: nlu, code"):
        read(validator, "x", registry=several, adapter="pair", tasks=["math"])


def test_without_an_adapter_only_the_base_model_answers(validator):
    none = Registry()
    found = read(validator, "x", registry=none, base=True)
    assert found.adapter is None and found.task_set.is_base
    for selection in ({}, {"tasks": ["math"]}, {"as_trained": "math"}):
        with pytest.raises(InvalidRequest, match="select base"):
            read(validator, "x", registry=none, **selection)
    with pytest.raises(UnknownTask, match="choose from: none"):
        read(validator, "x", registry=none, adapter="trio", base=True)
    with pytest.raises(DigestMismatch):
        read(validator, "x", registry=none, base=True, adapter_digest="0" * 64)


# --- sampling


def test_unset_fields_have_vllms_defaults():
    vllm = pytest.importorskip("vllm.sampling_params", reason=needs("vLLM"))
    theirs = vllm.SamplingParams()
    ours = sampling.read(pb.SamplingParams(), VOCAB_SIZE)
    assert ours == Sampling()
    for field in dataclasses.fields(Sampling):
        name = {"structured_output": "structured_outputs"}.get(field.name, field.name)
        mine, other = getattr(ours, field.name), getattr(theirs, name)
        assert mine == other or (not mine and not other and mine is not False), field.name


NUMBERS = st.floats(-3, 3) | st.sampled_from(
    [0.0, 1.0, -0.0, 0.01, 0.005, 2.0, 100.0, 1e300, math.inf, -math.inf, math.nan]
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 5),
        "min_tokens": st.integers(0, 5),
        "temperature": NUMBERS,
        "top_p": NUMBERS,
        "top_k": st.integers(-3, 400),
        "min_p": NUMBERS,
        "seed": st.integers(-2, 2**63 - 1),
        "stop": st.lists(st.text(max_size=3), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 2 * VOCAB_SIZE), max_size=3),
        "repetition_penalty": NUMBERS,
        "presence_penalty": NUMBERS,
        "frequency_penalty": NUMBERS,
        "logit_bias": st.dictionaries(st.integers(0, 2 * VOCAB_SIZE), NUMBERS, max_size=3),
        "logprobs": st.integers(0, 30),
        "n": st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
    },
)


@given(PARAMS)
@settings(max_examples=500, deadline=None)
def test_valid_parameters_are_accepted_by_vllm_unchanged(given_params):
    """Otherwise vLLM would refuse it with an answer of its own, or obey something else than was asked for."""
    vllm = pytest.importorskip("vllm.sampling_params", reason=needs("vLLM"))
    try:
        ours = sampling.read(pb.SamplingParams(**given_params), VOCAB_SIZE)
    except InvalidRequest as error:
        assert {p.field.split("[")[0] for p in error.problems} <= {
            f"sampling.{name}" for name in (*given_params, "n", "min_tokens")
        }
        return
    passed = dataclasses.asdict(ours)
    passed["structured_outputs"] = passed.pop("structured_output")  # vLLM's name
    lists = {name: list(value) for name, value in passed.items() if isinstance(value, tuple)}
    theirs = vllm.SamplingParams.from_optional(**copy.deepcopy(passed | lists))
    for name, value in passed.items():
        if ours.temperature == 0 and name in ("top_p", "top_k", "min_p"):
            continue  # greedy: vLLM switches them off
        assert lists.get(name, value) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 0.001}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ["x"] * 3 + [""]}, "stop[3]"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, f"logit_bias[{VOCAB_SIZE}]"),
        ({"logit_bias": {3: math.nan}}, "logit_bias[3]"),
        ({"logit_bias": {3: 101.0}}, "logit_bias[3]"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 2, "temperature": 0.0}, "n"),
    ],
)
def test_a_sampling_field_out_of_range_is_named(validator, params, field):
    with pytest.raises(InvalidRequest) as error:
        read(validator, "x", **params)
    assert fields(error) == {f"sampling.{field}"}


def test_top_k_of_minus_one_means_off(validator):
    assert read(validator, "x", top_k=-1).sampling.top_k == 0


# --- all together


def test_every_mistake_is_named_at_once(validator):
    with pytest.raises(InvalidRequest) as error:
        read(
            validator,
            "",
            tasks={"nlu": 99.0, "art": 1.0},
            request_id="\x00",
            top_p=2.0,
            n=99,
            stop=[""],
            logit_bias={10**6: math.inf},
        )
    assert fields(error) == {
        "prompt",
        "task_selection.tasks.tasks[0].weight",
        "task_selection.tasks.tasks[1].name",
        "request_id",
        "sampling.top_p",
        "sampling.n",
        "sampling.stop[0]",
        "sampling.logit_bias[1000000]",
    }


def test_invalid_fields_take_precedence_over_unknown_names_and_those_over_the_digest(validator):
    with pytest.raises(InvalidRequest) as error:
        read(validator, "x", adapter="duo", tasks={"nlu": 99.0}, top_p=2.0)
    assert fields(error) == {"adapter", "task_selection.tasks.tasks[0].weight", "sampling.top_p"}
    with pytest.raises(UnknownTask):
        read(validator, "x", adapter_digest="0", tasks=["art"])


def test_equal_request_ids_reach_the_backend_as_different_ones(validator):
    first, second = (read(validator, "x", request_id="same").request_id for _ in range(2))
    assert first != second and first.startswith("same-")


@given(
    prompt=st.none() | st.text(max_size=40),
    token_ids=st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=5),
    tasks=st.none() | st.dictionaries(st.sampled_from([*TRIO, "art", ""]), NUMBERS, max_size=4),
    adapter=st.sampled_from(["", "trio", "duo"]),
    template=st.booleans(),
    params=PARAMS,
)
@settings(max_examples=300, deadline=None)
def test_every_invalid_request_names_a_field(validator, prompt, token_ids, tasks, adapter, template, params):
    if prompt is not None:
        token_ids = None
    request = request_of(
        pb.StreamGenerateRequest,
        prompt,
        prompt_token_ids=token_ids,
        tasks=tasks,
        adapter=adapter,
        apply_task_template=template,
        **params,
    )
    try:
        found = validator.read_now(pb.StreamGenerateRequest.FromString(request.SerializeToString()), one_adapter())
    except (InvalidRequest, UnknownTask) as error:
        assert all(problem.field and problem.message for problem in error.problems)
        return
    assert found.prompt_token_ids and max(found.prompt_token_ids) < VOCAB_SIZE
    assert 1 <= found.sampling.max_tokens <= 256 - len(found.prompt_token_ids)
    assert found.sampling.min_tokens <= found.sampling.max_tokens
    assert set(found.task_set.names) <= set(TRIO)
    assert all(math.isfinite(weight) and 0 < abs(weight) <= 16 for _, weight in found.task_set.weights)
