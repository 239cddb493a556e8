"""Answers to completions and chats: by vLLM's own app where the backend runs vLLM, else through the backend itself.

body ──▶ asked ──▶ Generations: admission, lease ──▶ names, access, Validator ─┬▶ vLLM's app ──▶ relay ──▶ client
                                                                               └▶ merged ──▶ client
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, LorafError, Problem, one_line
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import Backend, GenerationRequest
from loraf_serve.backends.fallback import Fallback
from loraf_serve.errors import DeadlineExceeded, InvalidRequest, ReadsTooSlowly
from loraf_serve.http import merged
from loraf_serve.http.asked import PROMPT_LOGPROBS, TASK_TEMPLATE, Asked, read_completion
from loraf_serve.http.chats import read_chat
from loraf_serve.http.errors import HttpRefusal, OnlyVllm
from loraf_serve.http.exchange import ClientGone, Exchange
from loraf_serve.http.mistakes import Mistakes
from loraf_serve.http.models import for_client
from loraf_serve.request import names, selection
from loraf_serve.request.structured_output import FIELD as FORM
from loraf_serve.request.validation import request_id_problem
from loraf_serve.security.allowance import Allowance
from loraf_serve.security.permissions import Permissions
from loraf_serve.service import access
from loraf_serve.service.doors import Inside

if TYPE_CHECKING:
    from loraf_serve.vllm.http.app import EngineApp

log = logging.getLogger(__name__)

PROMPT_HEADER = "loraf-prompt"
"""A header of answers to chats with `apply_task_template`: what has become of the message."""

_RUN_VLLM = ("resident", "slots")  # names of backends


class Answering:
    """Handlers of /v1/completions and /v1/chat/completions.

    Args:
        tool_parser: vLLM's name of a parser for calls of tools; "" for none.
    """

    def __init__(self, inside: Inside, tool_parser: str = ""):
        self._inside = inside
        self._tool_parser = tool_parser
        self._app: EngineApp | None = None

    async def open(self) -> None:
        """Makes vLLM's app, if the backend runs vLLM. Raises ConfigError: it cannot be made of the installed vLLM, or
        there is no such parser of tools."""
        backend = self._inside.backend
        await asyncio.to_thread(self._make_app, backend.current if isinstance(backend, Fallback) else backend)

    def _make_app(self, backend: Backend) -> None:
        self._app = None
        if backend.name in _RUN_VLLM:
            from loraf_serve.vllm.engine.vllm_backend import VllmBackend

            try:
                from loraf_serve.vllm.http.app import EngineApp
            except ImportError as error:
                message = f"vLLM's app cannot be imported ({one_line(error)})"
                remedy = "serve without it, or with --backend merged"
                raise ConfigError(Problem(message, "--http-port", remedy=remedy)) from None
            assert isinstance(backend, VllmBackend)
            self._app = EngineApp(backend, self._tool_parser)
        elif self._tool_parser:
            log.warning("--tool-call-parser has no effect: the parsers are vLLM's, which %s does not run", backend.name)

    async def _settled_app(self) -> EngineApp | None:
        """vLLM's app on the backend that serves; None if that does not run vLLM."""
        backend = self._inside.backend
        if isinstance(backend, Fallback):
            backend = backend.settled()
        if (backend.name in _RUN_VLLM) != (self._app is not None) or (self._app and self._app.backend is not backend):
            await asyncio.to_thread(self._make_app, backend)  # it was replaced while an adapter was loaded
        return self._app

    async def completions(self, exchange: Exchange, permissions: Permissions, _: str) -> None:
        """Answers /v1/completions."""
        await self._answer(exchange, permissions, read_completion(await exchange.read_object()))

    async def chats(self, exchange: Exchange, permissions: Permissions, _: str) -> None:
        """Answers /v1/chat/completions."""
        await self._answer(exchange, permissions, read_chat(await exchange.read_object()))

    async def _answer(self, exchange: Exchange, permissions: Permissions, asked: Asked) -> None:
        if asked.request_id and not request_id_problem(asked.request_id):  # which validation tells
            exchange.call.request_id = asked.request_id
        deadline = self._inside.options.default_deadline
        mistakes = Mistakes(asked.problems, partial(self._named, asked.field_of, permissions))
        try:
            async with asyncio.timeout(deadline) as timeout:
                generations = self._inside.generations
                with (
                    generations.entered(asked.name.adapter, permissions, len(asked.requests)) as (registry, allowances),
                    exchange.connection.held(),
                ):
                    await self._admitted(exchange, permissions, asked, mistakes, registry, allowances)
        except (ClientGone, ReadsTooSlowly, HttpRefusal):
            raise
        except TimeoutError:
            if deadline is not None and timeout.expired():
                raise DeadlineExceeded(deadline) from None
            raise
        except Exception as error:
            shown = await self._inside.generations.shown(error, permissions)
            if isinstance(shown, LorafError) and error is not mistakes.told:
                shown = self._named(asked.field_of, permissions, shown)
            raise shown from None

    def _named(self, field_of: Callable[[str], str], permissions: Permissions, error: LorafError) -> LorafError:
        """What the client may know of an error, in the names that it knows."""
        return for_client(error, self._inside.library.registry, permissions, field_of)

    async def _admitted(
        self,
        exchange: Exchange,
        permissions: Permissions,
        asked: Asked,
        mistakes: Mistakes,
        registry: Registry,
        allowances: Sequence[Allowance],
    ) -> None:
        """Answers a request that has its places."""
        generations = self._inside.generations
        app = await self._settled_app()
        for request in asked.requests:
            with mistakes.gathered(is_unread=True):
                asked.name.select(request, registry, permissions)
            if mistakes.is_unread(names.FIELD):  # the rest is looked at as if it was the base model that is asked
                request.task_selection.base.SetInParent()
                request.apply_task_template = False
        self._note_unserved(asked, app, mistakes)
        if asked.is_chat:
            with mistakes.gathered(is_unread=True):
                self._choose_template(exchange, asked, registry)
        if app and asked.requests[0].WhichOneof("input") == "messages":
            await self._rendered_by_app(exchange, permissions, asked, mistakes, registry, allowances[0], app)
            return
        valid = []
        for place, request in enumerate(asked.requests):
            asked.place = place
            with mistakes.gathered():
                valid.append(await generations.validated(request, registry, permissions))
            if mistakes.are_enough:
                break
        mistakes.require_none()
        for prompt, allowance in zip(valid, allowances, strict=True):
            generations.begin(prompt, allowance)
        generations.note_request(exchange.call, valid, partial(_prompt_text, asked))
        if app:
            from loraf_serve.http import relay

            await relay.answer(self._inside, exchange, asked, app, allowances, valid)
        else:
            await exchange.while_there(merged.answer(self._inside, exchange, asked, allowances, valid))

    async def _rendered_by_app(
        self,
        exchange: Exchange,
        permissions: Permissions,
        asked: Asked,
        mistakes: Mistakes,
        registry: Registry,
        allowance: Allowance,
        app: EngineApp,
    ) -> None:
        """Answers a chat that vLLM's app renders: its prompt is validated then."""
        from loraf_serve.http import relay

        generations = self._inside.generations
        access.require_asked(asked.requests[0], permissions)
        with mistakes.gathered():
            unrendered = await generations.validator.read_unrendered(asked.requests[0], registry)
            access.require_selected(unrendered.task_set, permissions)
        mistakes.require_none()

        def rendered(token_ids: Sequence[int]) -> GenerationRequest:
            valid = generations.validator.rendered(unrendered, token_ids)
            generations.begin(valid, allowance)
            generations.note_request(exchange.call, [valid], partial(_prompt_text, asked))
            return valid

        await relay.answer(self._inside, exchange, asked, app, [allowance], [], unrendered, rendered)

    def _note_unserved(self, asked: Asked, app: EngineApp | None, mistakes: Mistakes) -> None:
        """Notes what only vLLM's app can do and there is none; tokens that the model does not have."""
        problems = []
        if app is None:
            backend = self._inside.backend.name
            beyond = list(asked.beyond)
            if asked.is_chat:
                beyond += ["tools"] if asked.tool_choice != "none" else []
                last = asked.requests[0].messages.messages[-1:]
                if last and last[0].role == "assistant" and asked.continues:
                    beyond = [name for name in beyond if name not in _CONTINUE]
                elif last and last[0].role == "assistant":
                    beyond.append("messages")  # gRPC's way would continue it
            params = asked.requests[0].sampling
            if params.HasField("prompt_logprobs") and PROMPT_LOGPROBS not in asked.renamed:
                beyond.append("prompt_logprobs")
            if params.HasField("structured_output") and backend == "merged":
                beyond.append(asked.field_of(FORM))
                for request in asked.requests:
                    request.sampling.ClearField("structured_output")  # nothing more is told of it
            remedy = "leave it out, or serve with --backend resident or slots"
            message = f"the {backend} backend cannot do this; vLLM's app can"
            if beyond:
                mistakes.add(OnlyVllm(Problem(message, field, remedy=remedy) for field in dict.fromkeys(beyond)))
        elif asked.tool_choice not in (None, "none") and not app.has_tool_parser:
            remedy = "use none, or start the server with --tool-call-parser"
            problems.append(Problem("the server does not read calls of tools", "tool_choice", remedy=remedy))
        size = self._inside.generations.validator.vocab_size
        for name in ("allowed_token_ids", "logprob_token_ids"):
            wrong = next((token for token in asked.for_app.get(name, ()) if token >= size), None)
            if wrong is not None:
                remedy = f"use ids from 0 to {size - 1}"
                problems.append(Problem(f"{wrong} is not in the vocabulary", name, remedy=remedy))
        if problems:
            mistakes.add(InvalidRequest(problems))

    def _choose_template(self, exchange: Exchange, asked: Asked, registry: Registry) -> None:
        """Makes a prompt of a chat's only message, if that is asked for.

        Raises:
            InvalidRequest: it is asked for, and there are more messages, or tools; or the model has no chat template.
        """
        request = asked.requests[0]
        has_template = bool(self._inside.backend.tokenizer.chat_template)
        if not asked.apply_task_template:
            if not has_template:
                remedy = f"set {TASK_TEMPLATE} to send one message in the task's own template, or use /v1/completions"
                raise InvalidRequest(Problem("the model has no chat template", "messages", remedy=remedy))
            return
        messages = request.messages.messages
        if len(messages) != 1 or messages[0].role != "user" or request.tools:
            message, remedy = "takes one message of the user, and no tools", "leave it out, or send one message"
            raise InvalidRequest(Problem(message, TASK_TEMPLATE, remedy=remedy))
        only_task = selection.read(request, registry, [])[2]
        text = messages[0].content
        if only_task is not None:
            request.prompt, request.apply_task_template = text, True
            exchange.answer_headers.append((PROMPT_HEADER, f"task template of {only_task}"))
        elif has_template:
            exchange.answer_headers.append((PROMPT_HEADER, "chat template"))
        else:
            request.prompt = text
            exchange.answer_headers.append((PROMPT_HEADER, "plain"))
        if request.prompt:
            asked.renamed |= {"prompt": "messages[0].content"}


_CONTINUE = ("continue_final_message", "add_generation_prompt")


def _prompt_text(asked: Asked) -> str:
    first = asked.requests[0]
    return first.prompt or str(first.messages or first.prompt_token_ids)
