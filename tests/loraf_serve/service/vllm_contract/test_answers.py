"""vllm.Inference: the answers are those of LoRAF's own contract, and nothing in a request is ignored."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from loraf_serve.v1 import generation_pb2 as pb
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb
from tests.loraf_serve.asking import ask, failure, violations
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import one_adapter, serving
from tests.loraf_serve.service.vllm_contract.stand import MODEL, asked, joined, speaking

CODES = grpc.StatusCode
IDS = vllm_pb.ResponseOptions(output_token_ids=True)


@pytest.fixture(scope="module")
def stand():
    with speaking() as it:
        yield it


def params(**fields) -> vllm_pb.StoppingCriteria:
    return vllm_pb.StoppingCriteria(max_new_tokens=7, **fields)


# --- answers


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("", {"base": True}),
        ("base", {"base": True}),
        ("trio", {}),
        ("trio@all", {}),
        ("trio@math:0.5+nlu", {"tasks": {"math": 0.5, "nlu": 1.0}}),
        ("trio@as_trained=nlu", {"as_trained": "nlu"}),
        ("pair@code", {"adapter": "pair", "tasks": {"code": 1.0}}),
    ],
)
def test_the_answer_is_that_of_our_own_contract(stand, name, selection):
    request = asked(lora_name=name, stopping=params(), response=IDS)
    theirs = stand.inference.Generate(request).outputs
    pieces = list(stand.inference.GenerateStream(request))
    own = stand.running.generation.Generate(ask("hello", max_tokens=7, **selection)).choices[0]
    assert (theirs.text, list(theirs.token_ids)) == (own.text, list(own.token_ids))
    assert joined(pieces) == (own.text, list(own.token_ids))
    assert theirs.num_tokens == theirs.finish_info.num_output_tokens == 7
    assert theirs.finish_info.finish_reason == vllm_pb.FinishInfo.LENGTH


def test_a_stream_begins_with_the_prompt_and_ends_with_the_reason(stand):
    response = vllm_pb.ResponseOptions(prompt_token_ids=True)
    first, *pieces = stand.inference.GenerateStream(asked(lora_name="trio", stopping=params(), response=response))
    prompt = stand.backend.requests[-1].prompt_token_ids
    assert first == vllm_pb.GenerateResponse(
        prompt_info=vllm_pb.PromptInfo(num_prompt_tokens=len(prompt), token_ids=prompt)
    )
    assert [piece.outputs.HasField("finish_info") for piece in pieces] == [False] * 6 + [True]
    assert pieces[-1].outputs.finish_info.num_cached_tokens == 1
    assert not any(piece.outputs.token_ids for piece in pieces)  # not asked for


def test_unset_fields_mean_what_vllm_says(stand):
    text = stand.inference.Generate(asked(lora_name="trio")).outputs.text
    passed = stand.backend.requests[-1].sampling
    assert text == expected_text(stand.backend.requests[-1])
    assert (passed.temperature, passed.max_tokens, passed.n, passed.top_k, passed.top_p) == (0.0, 20, 1, 0, 1.0)
    assert (passed.repetition_penalty, passed.logprobs, passed.skip_special_tokens, passed.seed) == (
        1.0,
        None,
        True,
        None,
    )


def test_every_field_that_is_served_reaches_the_backend(stand):
    request = asked(
        lora_name="trio@math",
        model=MODEL,
        temperature=0.7,
        session_id="one",
        watermarking=True,
        sampling=vllm_pb.RandomSampling(num_sequences=2, top_k=5, top_p=0.9, min_p=0.1, seed=4),
        decoding=vllm_pb.DecodingParameters(
            presence_penalty=0.3, frequency_penalty=-0.2, repetition_penalty=1.1, logit_bias={5: 1.5}, regex="a+"
        ),
        stopping=vllm_pb.StoppingCriteria(max_new_tokens=9, stop_token_ids=[3], stop_strings=["!"]),
        response=vllm_pb.ResponseOptions(skip_special_tokens=False),
        engine_reasoning_gate=vllm_pb.EngineReasoningGate(reasoning_ended=True),
    )
    list(stand.inference.GenerateStream(request))
    theirs = stand.backend.requests[-1]
    own = ask("hello", tasks={"math": 1.0}, n=2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=4, max_tokens=9)
    own.sampling.MergeFrom(
        pb.SamplingParams(
            presence_penalty=0.3,
            frequency_penalty=-0.2,
            repetition_penalty=1.1,
            logit_bias={5: 1.5},
            stop=["!"],
            stop_token_ids=[3],
            skip_special_tokens=False,
            structured_output=pb.StructuredOutput(regex="a+"),
        )
    )
    stand.running.generation.Generate(own)
    ours = stand.backend.requests[-1]
    assert (theirs.sampling, theirs.task_set, theirs.adapter.name) == (ours.sampling, ours.task_set, "trio")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"json": '{"type": "object"}'}, ("json_schema", '{"type": "object"}')),
        ({"json_object": True}, ("json_schema", '{"type": "object"}')),
        ({"json_object": False}, None),
        ({"choice": vllm_pb.DecodingParameters.StringChoices(choices=["a", "b"])}, ("choice", ("a", "b"))),
        ({"grammar": "root ::= a"}, ("grammar", "root ::= a")),
    ],
)
def test_forms_of_answers(stand, form, expected):
    stand.inference.Generate(asked(decoding=vllm_pb.DecodingParameters(**form), stopping=params()))
    got = stand.backend.requests[-1].sampling.structured_output
    assert (got and (got.kind, got.value)) == expected


def test_token_ids_and_several_answers_in_one_stream(stand):
    request = vllm_pb.GenerateRequest(token_ids=vllm_pb.TokenIds(ids=[5, 6, 7]), temperature=1.0, lora_name="trio@nlu")
    request.sampling.num_sequences = 3
    texts = {}
    for piece in stand.inference.GenerateStream(request):
        texts[piece.outputs.index] = texts.get(piece.outputs.index, "") + piece.outputs.text
    passed = stand.backend.requests[-1]
    assert passed.prompt_token_ids == (5, 6, 7)
    assert texts == {i: expected_text(passed, i) for i in range(3)}


def test_log_probabilities_of_the_prompt_and_the_answer(stand):
    candidates = vllm_pb.CandidateTokens(top_n=2)
    options = vllm_pb.ResponseOptions(
        output_text=False,
        output_logprobs=True,
        output_candidates=candidates,
        prompt_logprobs=True,
        prompt_candidates=candidates,
    )
    response = stand.inference.Generate(asked("hey", response=options, stopping=params(), lora_name="trio"))
    passed = stand.backend.requests[-1]
    assert (passed.sampling.logprobs, passed.sampling.prompt_logprobs) == (2, 2)
    assert response.outputs.text == ""
    assert list(response.outputs.logprobs) == [-0.5] * 7 and list(response.outputs.ranks) == [1] * 7
    assert len(response.outputs.candidate_tokens) == 7
    assert not any(info.tokens for info in response.outputs.candidate_tokens)  # the fake's are the chosen token
    count = len(passed.prompt_token_ids)
    assert list(response.prompt_info.logprobs) == [0.0, *(-float(i) for i in range(1, count))]
    assert list(response.prompt_info.ranks) == [0, *[1] * (count - 1)]
    assert len(response.prompt_info.candidate_tokens) == count


# --- refusals

WITH_VALUE = Struct()
WITH_VALUE.update({"a": 1})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"media": [vllm_pb.MediaItem(url="http://x/a.png")]}, "media"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"kv_hints": vllm_pb.KVHintsEnvelope()}, "kv_hints"),
        ({"kv": vllm_pb.KVCacheParameters(bypass_prefix_cache=True)}, "kv.bypass_prefix_cache"),
        ({"kv": vllm_pb.KVCacheParameters(cache_salt="s")}, "kv.cache_salt"),
        ({"kv": vllm_pb.KVCacheParameters(kv_transfer_params=WITH_VALUE)}, "kv.kv_transfer_params"),
        ({"kv": vllm_pb.KVCacheParameters(ec_transfer_params=Struct())}, "kv.ec_transfer_params"),
        (
            {"engine_reasoning_gate": vllm_pb.EngineReasoningGate(reasoning_ended=False)},
            "engine_reasoning_gate.reasoning_ended",
        ),
        (
            {"engine_reasoning_gate": vllm_pb.EngineReasoningGate(chat_template_kwargs=WITH_VALUE)},
            "engine_reasoning_gate.chat_template_kwargs",
        ),
        ({"decoding": vllm_pb.DecodingParameters(allowed_token_ids=[1])}, "decoding.allowed_token_ids"),
        (
            {"decoding": vllm_pb.DecodingParameters(bad_words_token_ids=[vllm_pb.TokenIds(ids=[1])])},
            "decoding.bad_words_token_ids",
        ),
        ({"decoding": vllm_pb.DecodingParameters(structural_tag="x")}, "decoding.structural_tag"),
        ({"stopping": params(include_stop_strings=True)}, "stopping.include_stop_strings"),
        ({"stopping": params(thinking_token_budget=0)}, "stopping.thinking_token_budget"),
        ({"sampling": vllm_pb.RandomSampling(num_sequences=2)}, "sampling.num_sequences"),
        (
            {"response": vllm_pb.ResponseOptions(output_candidates=vllm_pb.CandidateTokens(top_n=1))},
            "response.output_candidates",
        ),
        (
            {
                "response": vllm_pb.ResponseOptions(
                    output_logprobs=True, output_candidates=vllm_pb.CandidateTokens(all=True)
                )
            },
            "response.output_candidates.all",
        ),
        (
            {
                "response": vllm_pb.ResponseOptions(
                    prompt_logprobs=True,
                    prompt_candidates=vllm_pb.CandidateTokens(token_ids=vllm_pb.TokenIds(ids=[1])),
                )
            },
            "response.prompt_candidates.token_ids",
        ),
        ({"lora_name": "trio@"}, "lora_name"),
        ({"lora_name": "trio@" + "math+" * 200_000 + "nlu"}, "lora_name"),
        (
            {"decoding": vllm_pb.DecodingParameters(logit_bias=dict.fromkeys(range(200_000), 0.1))},
            "decoding.logit_bias",
        ),
        # found by the same validation as LoRAF's own, named as this client wrote them
        ({"text": ""}, "text"),
        ({"temperature": 9.0}, "temperature"),
        ({"sampling": vllm_pb.RandomSampling(top_p=0.0)}, "sampling.top_p"),
        ({"stopping": vllm_pb.StoppingCriteria(stop_strings=[""])}, "stopping.stop_strings[0]"),
        ({"stopping": vllm_pb.StoppingCriteria(min_new_tokens=21)}, "stopping.min_new_tokens"),
        ({"decoding": vllm_pb.DecodingParameters(presence_penalty=9)}, "decoding.presence_penalty"),
        ({"decoding": vllm_pb.DecodingParameters(logit_bias={100000: 1})}, "decoding.logit_bias[100000]"),
        ({"decoding": vllm_pb.DecodingParameters(json="[")}, "decoding.json"),
        (
            {
                "response": vllm_pb.ResponseOptions(
                    output_logprobs=True, output_candidates=vllm_pb.CandidateTokens(top_n=99)
                )
            },
            "response.output_candidates.top_n",
        ),
        ({"priority": 5000}, "priority"),
        ({"lora_name": "@math"}, "lora_name"),  # two adapters are loaded
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused_by_name_with_a_remedy(stand, fields, field):
    before = len(stand.backend.requests)
    error = failure(lambda: stand.inference.Generate(vllm_pb.GenerateRequest(**{"text": "hi", **fields})))
    assert error.code() is CODES.INVALID_ARGUMENT
    found = violations(error)
    assert field in found and "→" in found[field]
    assert len(stand.backend.requests) == before


def test_all_mistakes_are_named_at_once(stand):
    request = asked(truncate_prompt_tokens=1, kv=vllm_pb.KVCacheParameters(cache_salt="s"), lora_name="trio@+")
    found = violations(failure(lambda: stand.inference.Generate(request)))
    assert set(found) == {"truncate_prompt_tokens", "kv.cache_salt", "lora_name"}


def test_no_prompt_a_number_of_another_protocol_and_another_rank(stand):
    assert "prompt" in violations(failure(lambda: stand.inference.Generate(vllm_pb.GenerateRequest())))
    unknown = vllm_pb.GenerateRequest.FromString(asked().SerializeToString() + bytes([0xA0, 0x06, 0x01]))  # field 100
    assert "100" in violations(failure(lambda: stand.inference.Generate(unknown)))
    ranked = failure(lambda: stand.inference.Generate(asked(), metadata=(("x-data-parallel-rank", "1"),)))
    assert ranked.code() is CODES.INVALID_ARGUMENT
    assert stand.inference.Generate(asked(), metadata=(("x-data-parallel-rank", "0"),)).outputs.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "another"}, "lora_name selects tasks"),
        ({"lora_name": "nobody"}, "choose from"),
        ({"lora_name": "trio@poetry"}, "choose from"),
    ],
)
def test_unknown_names_are_not_found(stand, fields, words):
    error = failure(lambda: stand.inference.Generate(asked(**fields)))
    assert error.code() is CODES.NOT_FOUND and words in error.details()


def test_a_field_that_the_backend_lacks_is_named_as_the_client_wrote_it():
    backend = FakeBackend()
    backend.unsupported = "min_p"
    with speaking(backend) as stand:
        assert "sampling.min_p" in violations(failure(lambda: stand.inference.Generate(asked())))


def test_without_the_option_the_contract_is_not_there():
    with serving(FakeBackend(), one_adapter()) as running:
        call = running.channel.unary_unary("/vllm.Inference/Generate")
        assert failure(lambda: call(asked().SerializeToString())).code() is CODES.UNIMPLEMENTED
