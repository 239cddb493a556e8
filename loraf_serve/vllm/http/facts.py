"""What OpenAI's API relies on inside vLLM's app, in addition to `relied_on.FACTS`."""

from __future__ import annotations

import inspect
from typing import Any

from loraf.errors import Problem
from loraf_serve.vllm import relied_on
from loraf_serve.vllm.relied_on import Facts, fact, parameters

FACTS: Facts = {}


def problems() -> list[Problem]:
    """What no longer holds for the installed vLLM."""
    remedy = "serve without it, or with --backend merged"
    return [
        Problem(f"no longer true of the installed vLLM: {statement}", "--http-port", remedy=remedy)
        for statement in relied_on.broken(FACTS)
    ]


@fact(FACTS, "the routes of completions and chats ask app.state for their serving objects, and no router adds a prefix")
def _routes() -> bool:
    from vllm.entrypoints.openai.chat_completion import api_router as chats
    from vllm.entrypoints.openai.completion import api_router as completions

    routes: list[Any] = [*chats.router.routes, *completions.router.routes]  # their type has no path
    paths = {route.path for route in routes}
    asked = "state.openai_serving_completion" in inspect.getsource(completions.completion)
    asked = asked and "state.openai_serving_chat" in inspect.getsource(chats.chat)
    return asked and {"/v1/completions", "/v1/chat/completions"} <= paths


@fact(FACTS, "serving objects check a model's name with is_base_model, and take a LoRA only from lora_requests")
def _names() -> bool:
    from vllm.entrypoints.serve.engine.serving import BaseServing

    supported = inspect.getsource(BaseServing._is_model_supported)
    adapters = inspect.getsource(BaseServing._maybe_get_adapters)
    return "self.models.is_base_model(model_name)" in supported and "in self.models.lora_requests" in adapters


@fact(
    FACTS, "prompts of completions come from render_completion and of chats from render_chat, and go to generate as is"
)
def _prompts() -> bool:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    completion = inspect.getsource(OpenAIServingCompletion)
    chat = inspect.getsource(OpenAIServingChat)
    rendered = "await self.online_renderer.render_completion(request)" in completion
    rendered = rendered and "await self.online_renderer.render_chat(request)" in chat
    passed = all(
        "engine_client.generate(\n                    engine_input," in source for source in (completion, chat)
    )
    return rendered and passed


@fact(FACTS, "of an engine, serving objects use no more than EngineForApp has")
def _engine() -> bool:
    from vllm.entrypoints.generate.base import serving as base
    from vllm.entrypoints.openai.chat_completion import serving as chat
    from vllm.entrypoints.openai.completion import serving as completion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from loraf_serve.vllm.http.client import EngineForApp

    source = "".join(inspect.getsource(module) for module in (base, chat, completion))
    source += inspect.getsource(OpenAIServingModels.__init__)
    used = {part.split("(")[0].split(".")[0].split(")")[0] for part in source.split("engine_client.")[1:]}
    names = {name for name in (part.split()[0].strip(",:") for part in used) if name.isidentifier()}
    has = {*dir(EngineForApp), "vllm_config", "model_config", "renderer", "input_processor"}
    unused = {"notify_kv_transfer_request_rejected"}  # fields of the request that this server refuses
    return names - has <= unused


@fact(FACTS, "a field that is not sent has the value that gRPC gives it, where no generation config counts")
def _defaults() -> bool:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.sampling_params import SamplingParams

    from loraf_serve.backends.backend import Sampling
    from loraf_serve.vllm.engine.convert import sampling_params

    completion: Any = CompletionRequest(model="m", prompt=[0])
    chat: Any = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
    ours = sampling_params(Sampling())
    ignored = {"output_kind", "skip_clone", "stop_token_ids", "_all_stop_token_ids", "extra_args", "bad_words", "stop"}
    names = [name for name in SamplingParams.__struct_fields__ if name not in ignored]
    made = [request.to_sampling_params(16, {}) for request in (completion, chat)]
    return all(getattr(params, name) == getattr(ours, name) for params in made for name in names)


@fact(FACTS, "system_fingerprint is an attribute of a serving object, written into answers")
def _fingerprint() -> bool:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    sources = map(inspect.getsource, (OpenAIServingChat, OpenAIServingCompletion))
    return all("system_fingerprint=self.system_fingerprint" in source for source in sources)


@fact(FACTS, "the app ends a call when ASGI says http.disconnect, and its streams with it")
def _disconnect() -> bool:
    from starlette.responses import StreamingResponse
    from vllm.entrypoints.serve.utils.api_utils import listen_for_disconnect, with_cancellation

    listens = 'message["type"] == "http.disconnect"' in inspect.getsource(listen_for_disconnect)
    cancels = "task.cancel()" in inspect.getsource(with_cancellation)
    return listens and cancels and "http.disconnect" in inspect.getsource(StreamingResponse.listen_for_disconnect)


@fact(
    FACTS, 'errors are {"error": {message, param, code}}, in a stream after `data: `; GracefulHTTPError is one of them'
)
def _errors() -> bool:
    from http import HTTPStatus

    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import GracefulHTTPError, VLLMError

    made = create_error_response(GracefulHTTPError("text", HTTPStatus.BAD_GATEWAY)).model_dump()
    written = "json.dumps" in inspect.getsource(GenerateBaseServing.create_streaming_error_response)
    is_error = issubclass(GracefulHTTPError, VLLMError)
    return made["error"]["code"] == 502 and {"message", "param", "type"} <= set(made["error"]) and written and is_error


@fact(FACTS, "the log-probabilities of a completion are made by _create_completion_logprobs of vLLM's Logprob objects")
def _logprobs() -> bool:
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.logprobs import Logprob

    expected = ["self", "token_ids", "top_logprobs", "num_output_top_logprobs", "tokenizer", "logprob_token_ids"]
    expected += ["initial_text_offset", "return_as_token_id"]
    made = parameters(OpenAIServingCompletion._create_completion_logprobs) == expected
    return made and Logprob(logprob=0.0, rank=1, decoded_token="x").decoded_token == "x"


@fact(FACTS, "deltas join to the whole output with RequestOutput.add(…, aggregate=True)")
def _joining() -> bool:
    from vllm.outputs import CompletionOutput, RequestOutput

    def piece(text: str, token: int, finish: str | None) -> RequestOutput:
        completion = CompletionOutput(0, text, [token], None, None, finish_reason=finish)
        return RequestOutput("r", None, [1], None, [completion], finish is not None)

    whole = piece("a", 1, None)
    whole.add(piece("b", 2, "stop"), aggregate=True)
    (only,) = whole.outputs
    return (only.text, list(only.token_ids), only.finish_reason, whole.finished) == ("ab", [1, 2], "stop", True)
