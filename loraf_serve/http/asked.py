"""The body of a request for answers, as messages of gRPC, which validation reads; and what only vLLM's app reads.

    body ──▶ Asked: model's name, one GenerateRequest for each prompt, the body for vLLM's app

A field that nobody obeys is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraf.errors import Problem
from loraf_serve.errors import InvalidRequest
from loraf_serve.http.fields import (
    Fields,
    field_of,
    is_table,
    is_text,
    is_whole,
    read_sampling,
    set_number,
)
from loraf_serve.limits import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PROMPTS,
)
from loraf_serve.request import names
from loraf_serve.request.names import ModelName
from loraf_serve.request.structured_output import FIELD as FORM
from loraf_serve.v1 import generation_pb2 as pb

# Fields that vLLM's app obeys and no other backend, with the value that changes nothing.
_BEYOND = {
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "allowed_token_ids": [],
    "logprob_token_ids": [],
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "stream_interval": 1,
    "cache_salt": "",
    "thinking_token_budget": -1,
    "echo": False,
}
_BEYOND_CHAT = {
    "chat_template_kwargs": {},
    "reasoning_effort": "",
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "return_prompt_text": False,
}
# What vLLM's app would obey and this server does not.
_NOT_SERVED = {
    "use_beam_search": "beam search is not served",
    "best_of": "the best of several answers is not chosen; n returns them all",
    "suffix": "text after the answer is not served",
    "prompt_embeds": "embeddings of prompts are not served",
    "truncate_prompt_tokens": "prompts are not cut; send what fits",
    "documents": "documents are not served; put them into the messages",
    "chat_template": "the chat template is the model's own",
    "mm_processor_kwargs": "only text is served",
    "media_io_kwargs": "only text is served",
    "functions": "functions have been replaced by tools",
    "function_call": "function_call has been replaced by tool_choice",
}
TASK_TEMPLATE = "apply_task_template"
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
PROMPT_LOGPROBS = "sampling.prompt_logprobs"
_MOST = 1 << 20  # tokens


@dataclass
class Asked:
    """What a request asks for.

    Attributes:
        name: of the model.
        requests: one for each prompt, without adapter and task set.
        texts: of each prompt; None if it was sent as token ids, and for a chat.
        for_app: the body for vLLM's app.
        beyond: fields that only vLLM's app obeys.
        request_id: the client's; "" if it sent none.
        tool_choice: which tools the model may or must call; "none" without tools.
        apply_task_template: put the chat's only message into the task's template.
        renamed: fields of `requests` → fields of the body, where they differ.
        continues: the client asks that a last message of the assistant be continued, as over gRPC.
        place: of the request in `requests` that is being validated.
        problems: fields that could not be read; there is a request also then, without them.
    """

    is_chat: bool
    name: ModelName
    requests: list[pb.GenerateRequest]
    texts: list[str | None]
    for_app: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    request_id: str = ""
    beyond: list[str] = field(default_factory=list)
    tool_choice: Any = None
    apply_task_template: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    continues: bool = False
    place: int = 0
    problems: list[Problem] = field(default_factory=list)

    def field_of(self, field: str) -> str:
        """A field of the request at `place` → the field of the body that it was read from."""
        prompt = "prompt" if len(self.requests) == 1 else f"prompt[{self.place}]"
        prompts = dict.fromkeys(("prompt_token_ids.ids", "prompt_token_ids", "prompt", "input"), prompt)
        return field_of(field, prompts | _RENAMED | self.renamed)


_RENAMED = {
    "prompts": "prompt",
    "messages.messages": "messages",
    "adapter": names.FIELD,
    "task_selection": names.FIELD,
}


def read_completion(values: Mapping[str, Any]) -> Asked:
    """Reads the body of /v1/completions. Raises InvalidRequest: it has MOST_PROBLEMS mistakes."""
    fields = Fields(values, [])
    asked = read_common(fields)
    params = asked.requests[0].sampling
    params.CopyFrom(read_params(fields, asked))
    set_number(fields, params, "logprobs", fields.whole("logprobs"))
    prompts = _prompts(fields)
    template = asked.requests[0].apply_task_template = fields.flag(TASK_TEMPLATE)
    echo = values.get("echo") is True
    if echo:
        if template:
            fields.wrong("echo", f"does not go with {TASK_TEMPLATE}", "leave one of them out")
        if params.HasField("logprobs") and not params.HasField("prompt_logprobs"):
            params.prompt_logprobs = params.logprobs
            asked.renamed[PROMPT_LOGPROBS] = "logprobs"
        if params.HasField("max_tokens") and params.max_tokens == 0:
            params.max_tokens = 1  # as vLLM's app does: it generates one token and leaves it out
    fields.refuse_others()
    first = asked.requests[0]
    asked.requests = [] if prompts else [first]
    for prompt in prompts:
        request = pb.GenerateRequest()
        request.CopyFrom(first)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            _ids(fields, request, prompt)
        asked.requests.append(request)
        asked.texts.append(prompt if isinstance(prompt, str) else None)
    asked.for_app["prompt"] = [0]  # those of `requests` are used
    return asked


def read_common(fields: Fields, is_chat: bool = False) -> Asked:
    """What completions and chats share, with one request."""
    name = ModelName("")
    try:
        name = names.read(fields.text(names.FIELD))
    except InvalidRequest as error:
        fields.problems += error.problems
    asked = Asked(is_chat, name, [pb.GenerateRequest()], [], {}, problems=fields.problems)
    request = asked.requests[0]
    asked.stream = fields.flag("stream")
    options = fields.table("stream_options")
    if options is not None:
        inside = Fields(options, fields.problems, "stream_options")
        asked.include_usage = inside.flag("include_usage")
        if inside.flag("continuous_usage_stats"):
            asked.beyond.append("stream_options.continuous_usage_stats")
        inside.refuse_others()
        if not asked.stream:
            fields.wrong("stream_options", "needs stream", "set stream to true, or leave it out")
    asked.request_id = fields.text("request_id")
    request.request_id = asked.request_id
    priority = fields.whole("priority")
    if priority is not None and not -(1 << 31) <= priority < 1 << 31:
        fields.wrong("priority", f"{priority} is out of range", "use a smaller number")
    elif priority:  # 0 is what every request has
        request.priority = priority
    fields.text("user")  # OpenAI's name for the client's own user, which changes no answer
    for name_, reason in _NOT_SERVED.items():
        fields.refuse(name_, reason, unless=False)
    beyond = _BEYOND | _BEYOND_CHAT if is_chat else _BEYOND
    for name_, usual in beyond.items():
        value = fields.take(name_)
        if isinstance(usual, bool | str) and not isinstance(value, type(usual) | None):
            what = "true or false" if isinstance(usual, bool) else "a text"
            fields.wrong(name_, f"is not {what}", f"send {what}, or leave it out")
        elif value is not None and value != usual:
            asked.beyond.append(name_)
            asked.for_app[name_] = value
    _check_for_app(fields, asked)
    for name_ in (*_FOR_APP, *(_FOR_APP_CHAT if is_chat else ())):
        if (value := fields.take(name_)) is not None:
            asked.for_app[name_] = value
    return asked


# Fields that are checked here and obeyed by vLLM's app as they are.
_FOR_APP = (
    *("model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs"),
    *("stop_token_ids", "bad_words", "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs"),
)
_FOR_APP_CHAT = ("top_logprobs", "messages", "tools")
# Arguments with which vLLM's app itself calls the template.
_TEMPLATE_ARGUMENTS = (
    "self",
    "messages",
    "conversation",
    "model_config",
    "tokenizer",
    "tools",
    "documents",
    "tokenize",
)


def _check_for_app(fields: Fields, asked: Asked) -> None:
    """Checks what only vLLM's app obeys, where the app itself admits too much. Whether the model has a token is checked
    later."""
    for name, least in (("stream_interval", 1), ("thinking_token_budget", -1)):
        value = asked.for_app.get(name)
        if value is not None and not (is_whole(value) and least <= value < _MOST):
            fields.wrong(name, "is out of range", f"use a whole number from {least} to {_MOST - 1}, or leave it out")
    if asked.for_app.get("reasoning_effort", _EFFORTS[0]) not in _EFFORTS:
        fields.wrong("reasoning_effort", "is not one of the efforts", f"use {', '.join(_EFFORTS)}, or leave it out")
    template_values = asked.for_app.get("chat_template_kwargs", {})
    if not is_table(template_values):
        fields.wrong("chat_template_kwargs", "is not an object", "send an object, or leave it out")
    elif taken := sorted({*_TEMPLATE_ARGUMENTS} & template_values.keys()):
        fields.wrong(f"chat_template_kwargs.{taken[0]}", "is not a value of the template's own", "leave it out")
    elif "chat_template" in template_values:
        fields.wrong("chat_template_kwargs.chat_template", _NOT_SERVED["chat_template"], "leave it out")
    elif _has_large_number(template_values):
        fields.wrong("chat_template_kwargs", "has a number of more than 64 bits", "send a smaller one")
    for name, most in (("allowed_token_ids", MAX_LOGIT_BIASES), ("logprob_token_ids", MAX_LOGPROBS)):
        ids = asked.for_app.get(name)
        if ids is None:
            continue
        if not (isinstance(ids, list) and all(map(is_whole, ids)) and all(token >= 0 for token in ids)):
            fields.wrong(name, "is not a list of token ids", "send ids of the model's tokens, or leave it out")
        elif len(ids) > most:
            fields.wrong(name, f"has {len(ids)} ids", f"use at most {most}")
    if asked.for_app.get("logprob_token_ids") and fields.take("logprobs") in (None, False):
        fields.wrong("logprob_token_ids", "needs logprobs", "set logprobs, or leave it out")


def _has_large_number(value: Any) -> bool:
    """Whether a number in a value of JSON does not fit in 64 bits: vLLM's processes could not pass it on."""
    if isinstance(value, dict | list):
        return any(map(_has_large_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def _require_choice_of_tokens(fields: Fields, asked: Asked, params: pb.SamplingParams) -> None:
    """Refuses what could exclude every token together with `allowed_token_ids`."""
    if not asked.for_app.get("allowed_token_ids"):
        return
    others = {
        "bad_words": bool(params.bad_words),
        "min_tokens": params.min_tokens > 0,
        asked.renamed.get(FORM, ""): params.HasField("structured_output"),
    }
    for name, is_sent in others.items():
        if is_sent:
            fields.wrong("allowed_token_ids", f"could exclude every token with {name}", "leave one of them out")


def read_params(fields: Fields, asked: Asked) -> pb.SamplingParams:
    """The parameters of sampling."""
    form_field: list[str] = []
    params = read_sampling(fields, form_field)
    if form_field:
        asked.renamed[FORM] = form_field[0]
    if asked.stream and fields.take("prompt_logprobs") is not None:
        fields.wrong("prompt_logprobs", "is not sent in pieces", "leave it out, or do not stream")
    if "stop" in asked.for_app:
        # vLLM's app admits four; the engine gets those of the validated request.
        asked.for_app["stop"] = list(params.stop)[:1]
    _require_choice_of_tokens(fields, asked, params)
    max_tokens = fields.take("max_tokens")
    if max_tokens is not None and not asked.is_chat:
        asked.for_app["max_tokens"] = max_tokens
    return params


def _prompts(fields: Fields) -> list[Any]:
    """The prompts: texts, and lists of token ids."""
    prompt = fields.take("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(map(is_whole, prompt)):
            return [prompt]
        if len(prompt) > MAX_PROMPTS:
            fields.wrong("prompt", f"has {len(prompt)} prompts", f"use at most {MAX_PROMPTS}")
            return []
        if all(map(is_text, prompt)) or all(isinstance(ids, list) and all(map(is_whole, ids)) for ids in prompt):
            return prompt
    fields.wrong("prompt", "is no prompt", "send a text, token ids, or a list of either")
    return []


def _ids(fields: Fields, request: pb.GenerateRequest, ids: list[int]) -> None:
    request.prompt_token_ids.SetInParent()
    wrong = next((token for token in ids if not 0 <= token < 1 << 32), None)
    if wrong is None:
        request.prompt_token_ids.ids.extend(ids)
    else:
        fields.wrong("prompt", f"{wrong} is not in the vocabulary", "use ids of the model's tokens")
