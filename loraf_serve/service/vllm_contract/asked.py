"""Reads vllm.GenerateRequest: what it asks, as a GenerateRequest of LoRAF's contract, and how the answer is to be told.

Unset fields mean what vLLM 0.32 says they do: temperature 0, 20 tokens, no log-probabilities. What this server cannot
do is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loraf.errors import LorafError, Problem, UnknownTask
from loraf_serve.backends.backend import UnsupportedField
from loraf_serve.errors import InvalidRequest
from loraf_serve.limits import MAX_LOGIT_BIASES
from loraf_serve.request import names
from loraf_serve.request.names import ModelName
from loraf_serve.v1 import generation_pb2 as pb
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb

DEFAULT_NEW_TOKENS = 20
LORA_NAME = "lora_name"
RANK_KEY = "x-data-parallel-rank"  # metadata of a call: the copy of the model that is to answer it
_LARGEST_TOP_K = (1 << 31) - 1
_ANY_OBJECT = '{"type": "object"}'
_LEAVE_OUT = "leave it out"


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        request: without adapter and task set.
        name: of adapter and task set.
        response: what the answer is to hold.
    """

    request: pb.GenerateRequest
    name: ModelName
    response: vllm_pb.ResponseOptions

    @property
    def prompt(self) -> str:
        """The prompt as observers may see it."""
        return self.request.prompt or str(self.request.prompt_token_ids)


def read(request: vllm_pb.GenerateRequest, model: str, is_stream: bool, metadata: Mapping[str, str]) -> Asked:
    """Reads a request.

    Args:
        model: name of the base model.
        metadata: the call's.

    Raises:
        InvalidRequest: fields that this server cannot obey, or that contradict each other; all of them.
        UnknownTask: the request is for another model.
    """
    problems = [*_not_served(request), *_contradictions(request, is_stream)]
    if metadata.get(RANK_KEY, "0").strip() != "0":
        problems.append(Problem("there is one copy of the model, of rank 0", RANK_KEY, remedy=_LEAVE_OUT))
    name = ModelName(names.BASE, field=LORA_NAME)
    try:
        name = names.read(request.lora_name or names.BASE, LORA_NAME)
    except InvalidRequest as error:
        problems += error.problems
    if problems:
        raise InvalidRequest(problems)
    if request.model not in ("", model):
        remedy = f"leave it out, or send {model}; {LORA_NAME} selects tasks"
        raise UnknownTask(Problem(f"there is no model {request.model!r}", "model", remedy=remedy))
    return Asked(_converted(request), name, request.response)


def field_of(field: str) -> str:
    """A field of a GenerateRequest of LoRAF's contract → the field that it was read from."""
    for beginning, name in _FIELDS.items():
        if field == beginning or field.startswith((f"{beginning}.", f"{beginning}[")):
            return name if beginning in _WHOLLY else name + field[len(beginning) :]
    return field


def shown(error: Exception) -> Exception:
    """The error with fields of this contract."""
    if isinstance(error, UnsupportedField):
        return InvalidRequest(Problem(str(error), field_of(f"sampling.{error.field}"), remedy=_LEAVE_OUT))
    if isinstance(error, LorafError):
        return type(error)(replace(problem, field=field_of(problem.field)) for problem in error.problems)
    return error


_FIELDS = {
    "adapter": LORA_NAME,
    "task_selection": LORA_NAME,
    "input": "prompt",
    "prompt_token_ids": "token_ids",
    "prompt": "text",
    "sampling.temperature": "temperature",
    "sampling.n": "sampling.num_sequences",
    "sampling.max_tokens": "stopping.max_new_tokens",
    "sampling.min_tokens": "stopping.min_new_tokens",
    "sampling.stop": "stopping.stop_strings",
    "sampling.stop_token_ids": "stopping.stop_token_ids",
    "sampling.ignore_eos": "stopping.ignore_eos",
    "sampling.presence_penalty": "decoding.presence_penalty",
    "sampling.frequency_penalty": "decoding.frequency_penalty",
    "sampling.repetition_penalty": "decoding.repetition_penalty",
    "sampling.logit_bias": "decoding.logit_bias",
    "sampling.structured_output.json_schema": "decoding.json",
    "sampling.structured_output.regex": "decoding.regex",
    "sampling.structured_output.choice.texts": "decoding.choice.choices",
    "sampling.structured_output.grammar": "decoding.grammar",
    "sampling.structured_output": "decoding.structured_output",
    "sampling.logprobs": "response.output_candidates.top_n",
    "sampling.prompt_logprobs": "response.prompt_candidates.top_n",
    "sampling.skip_special_tokens": "response.skip_special_tokens",
}
_WHOLLY = ("adapter", "task_selection")  # nothing below them is a field of this contract


def _not_served(request: vllm_pb.GenerateRequest) -> Iterator[Problem]:
    """Fields that ask for what this server does not do."""
    decoding, stopping, kv, gate = request.decoding, request.stopping, request.kv, request.engine_reasoning_gate
    asked = (
        (bool(request.media), "media", "only text is served", _LEAVE_OUT),
        (bool(request.truncate_prompt_tokens), "truncate_prompt_tokens", "prompts are not cut", "send what fits"),
        (request.HasField("kv_hints"), "kv_hints", "the KV cache takes no hints", _LEAVE_OUT),
        (kv.bypass_prefix_cache, "kv.bypass_prefix_cache", "the prefix cache serves all requests", _LEAVE_OUT),
        (bool(kv.cache_salt), "kv.cache_salt", "the prefix cache takes no salt", _LEAVE_OUT),
        (kv.HasField("kv_transfer_params"), "kv.kv_transfer_params", "KV caches are not transferred", _LEAVE_OUT),
        (kv.HasField("ec_transfer_params"), "kv.ec_transfer_params", "encoder caches are not transferred", _LEAVE_OUT),
        (
            gate.HasField("reasoning_ended") and not gate.reasoning_ended,
            "engine_reasoning_gate.reasoning_ended",
            "the form of an answer holds from its first token on",
            "leave it out, or send true",
        ),
        (
            gate.HasField("chat_template_kwargs"),
            "engine_reasoning_gate.chat_template_kwargs",
            "the server reads no reasoning",
            _LEAVE_OUT,
        ),
        (bool(decoding.allowed_token_ids), "decoding.allowed_token_ids", "is not served", "use logit_bias, or a form"),
        (bool(decoding.bad_words_token_ids), "decoding.bad_words_token_ids", "is not served", _LEAVE_OUT),
        (
            decoding.WhichOneof("structured_output") == "structural_tag",
            "decoding.structural_tag",
            "is not served",
            "use json, regex, choice or grammar",
        ),
        (stopping.include_stop_strings, "stopping.include_stop_strings", "answers end before the text", _LEAVE_OUT),
        (
            stopping.HasField("thinking_token_budget") and stopping.thinking_token_budget != -1,
            "stopping.thinking_token_budget",
            "the server reads no reasoning",
            "leave it out, or send -1",
        ),
    )
    for is_asked, field, message, remedy in asked:
        if is_asked:
            yield Problem(message, field, remedy=remedy)


def _contradictions(request: vllm_pb.GenerateRequest, is_stream: bool) -> Iterator[Problem]:
    """Fields that contradict each other or the method, and what is too much to be read or answered."""
    biases = len(request.decoding.logit_bias)
    if biases > MAX_LOGIT_BIASES:  # converting them would take long
        remedy = f"use at most {MAX_LOGIT_BIASES}"
        yield Problem(f"has {biases} entries", "decoding.logit_bias", remedy=remedy)
    if request.sampling.num_sequences > 1 and not is_stream:
        message = "the response of Generate holds one answer"
        yield Problem(message, "sampling.num_sequences", remedy="use 1, or GenerateStream")
    for kind in ("output", "prompt"):
        field = f"response.{kind}_candidates"
        candidates: vllm_pb.CandidateTokens = getattr(request.response, f"{kind}_candidates")
        select = candidates.WhichOneof("select")
        if select == "all" and candidates.all:
            yield Problem("not all tokens are returned", f"{field}.all", remedy="use top_n")
        elif select == "token_ids" and candidates.token_ids.ids:
            yield Problem("tokens cannot be chosen", f"{field}.token_ids", remedy="use top_n")
        elif candidates.top_n and not getattr(request.response, f"{kind}_logprobs"):
            yield Problem(f"needs {kind}_logprobs", field, remedy=f"set response.{kind}_logprobs, or {_LEAVE_OUT}")


def _converted(request: vllm_pb.GenerateRequest) -> pb.GenerateRequest:
    """The request in LoRAF's contract, without adapter and task set. Ranges are checked later."""
    result = pb.GenerateRequest(request_id=request.request_id)
    if request.WhichOneof("prompt") == "text":
        result.prompt = request.text
    elif request.WhichOneof("prompt") == "token_ids":
        result.prompt_token_ids.SetInParent()
        result.prompt_token_ids.ids.extend(request.token_ids.ids)
    if request.priority:  # 0 is what every request has
        result.priority = request.priority
    params, sampling, stopping = result.sampling, request.sampling, request.stopping
    params.temperature = _shortest(request.temperature)
    if sampling.num_sequences:
        params.n = sampling.num_sequences
    if sampling.HasField("top_k"):
        params.top_k = min(sampling.top_k, _LARGEST_TOP_K)  # more than any vocabulary, so all tokens
    if sampling.HasField("top_p"):
        params.top_p = _shortest(sampling.top_p)
    if sampling.HasField("min_p"):
        params.min_p = _shortest(sampling.min_p)
    if sampling.HasField("seed"):
        params.seed = sampling.seed
    params.max_tokens = stopping.max_new_tokens or DEFAULT_NEW_TOKENS
    if stopping.min_new_tokens:
        params.min_tokens = stopping.min_new_tokens
    params.stop.extend(stopping.stop_strings)
    params.stop_token_ids.extend(stopping.stop_token_ids)
    params.ignore_eos = stopping.ignore_eos
    _convert_decoding(request.decoding, params)
    response = request.response
    if response.output_logprobs:
        params.logprobs = response.output_candidates.top_n
    if response.prompt_logprobs:
        params.prompt_logprobs = response.prompt_candidates.top_n
    if response.HasField("skip_special_tokens"):
        params.skip_special_tokens = response.skip_special_tokens
    return result


def _convert_decoding(decoding: vllm_pb.DecodingParameters, params: pb.SamplingParams) -> None:
    if decoding.presence_penalty:
        params.presence_penalty = _shortest(decoding.presence_penalty)
    if decoding.frequency_penalty:
        params.frequency_penalty = _shortest(decoding.frequency_penalty)
    if decoding.repetition_penalty:
        params.repetition_penalty = _shortest(decoding.repetition_penalty)
    for token, bias in decoding.logit_bias.items():
        params.logit_bias[token] = _shortest(bias)
    kind = decoding.WhichOneof("structured_output")
    if kind == "json":
        params.structured_output.json_schema = decoding.json
    elif kind == "json_object" and decoding.json_object:
        params.structured_output.json_schema = _ANY_OBJECT
    elif kind == "regex":
        params.structured_output.regex = decoding.regex
    elif kind == "grammar":
        params.structured_output.grammar = decoding.grammar
    elif kind == "choice":
        params.structured_output.choice.texts.extend(decoding.choice.choices)


def _shortest(number: float) -> float:
    """What a client meant by a 32-bit number: the decimal with the fewest digits that is it. 0.7, not 0.69999998807."""
    for digits in range(6, 10):
        decimal = float(f"{number:.{digits}g}")
        if struct.pack("f", decimal) == struct.pack("f", number):
            return decimal
    return number
