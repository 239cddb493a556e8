"""vLLM's OpenAI app on the engine of a backend."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completions
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from loraf.errors import ConfigError, Problem, one_line
from loraf_serve.backends.backend import Sampling
from loraf_serve.vllm.http import facts
from loraf_serve.vllm.http.admitted import ADMITTED, Admitted
from loraf_serve.vllm.http.client import EngineForApp
from loraf_serve.vllm.http.serving import AdmittedChat, AdmittedCompletion, AdmittedModels, AdmittedRenderer

if TYPE_CHECKING:
    from loraf_serve.vllm.engine.vllm_backend import VllmBackend

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TOOL_PARSER = "--tool-call-parser"


class EngineApp:
    """Answers admitted requests.

    Args:
        backend: started.
        tool_parser: vLLM's name of a parser for calls of tools; "" for none.

    Raises:
        ConfigError: vLLM cannot use the parser here, or is not the one that loraf was written for.
    """

    def __init__(self, backend: VllmBackend, tool_parser: str = ""):
        if broken := facts.problems():
            raise ConfigError(broken)
        self.backend = backend
        self.has_tool_parser = bool(tool_parser)
        engine = EngineForApp(backend)
        reasoning_parser = engine.vllm_config.structured_outputs_config.reasoning_parser
        tools: dict[str, Any] = {
            "enable_auto_tools": self.has_tool_parser,
            "tool_parser": tool_parser or None,
            "reasoning_parser": reasoning_parser,
        }
        try:
            self._app = _app(engine, tools)
        except Exception as error:
            if not tool_parser:
                raise
            message = f"vLLM cannot use {tool_parser!r} here ({one_line(error)})"
            remedy = "leave it out, or see vLLM's documentation of tool calling"
            raise ConfigError(Problem(message, TOOL_PARSER, remedy=remedy)) from None

    async def check_form(self, admitted: Admitted, sampling: Sampling) -> None:
        """Has the form of the answer tried, if the request asks for one. Raises LorafError: it cannot be kept to."""
        if sampling.structured_output is not None:
            admitted.form = await self.backend.checked_form(sampling.structured_output, sampling.stop_token_ids)

    async def answer(self, admitted: Admitted, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request, as an ASGI application does. May return before the engine has stopped working on it: see
        `Admitted.ended`."""
        ADMITTED.set(admitted)
        await self._app(scope, receive, send)


def tool_parsers() -> list[str]:
    """vLLM's names of parsers for calls of tools."""
    from vllm.tool_parsers import ToolParserManager

    names: list[str] = ToolParserManager.list_registered()
    return names


def _app(engine: EngineForApp, tools: Mapping[str, Any]) -> FastAPI:
    """vLLM's routes and serving classes.

    Args:
        tools: vLLM's arguments about parsers of tools and of reasoning.
    """
    client = cast(EngineClient, engine)  # has what the serving classes use of one
    models = AdmittedModels(client, [BaseModelPath(name="base", model_path="base")])
    renderer = AdmittedRenderer(
        engine.model_config,
        engine.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        **tools,
    )
    completion = AdmittedCompletion(client, models, online_renderer=renderer, request_logger=None)
    chat = AdmittedChat(
        client,
        models,
        "assistant",
        online_renderer=renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        **tools,
    )
    # As over gRPC: a field that is not sent has the same value whatever the model's own generation config says.
    for serving in (completion, chat):
        serving.default_sampling_params = {}
        serving.override_max_tokens = None
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    attach_completions(app)
    attach_chat(app)
    init_exception_handler(app)
    app.state.args = Namespace(sse_keep_alive_interval=0, log_error_stack=False)
    app.state.engine_client = engine
    app.state.openai_serving_models = models
    app.state.openai_serving_completion = completion
    app.state.openai_serving_chat = chat
    app.state.openai_serving_chat_batch = None
    app.state.enable_server_load_tracking = False
    return app
