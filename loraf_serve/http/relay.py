"""Passes a request to vLLM's app and its answer to the client. Imported only where the backend runs vLLM.

The head of an answer is held back until its first part is there, as over gRPC: an error before the first token is an
HTTP status, and a client may try again until then.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.errors import ReadsTooSlowly
from loraf_serve.http.asked import Asked
from loraf_serve.http.errors import ErrorAnswer, answer_of, answer_of_vllm
from loraf_serve.http.exchange import ClientGone, Exchange, Message, Part
from loraf_serve.request import names
from loraf_serve.request.validation import Unrendered
from loraf_serve.security.allowance import Allowance
from loraf_serve.security.permissions import Permissions
from loraf_serve.service.doors import Inside
from loraf_serve.service.outbox import Outbox
from loraf_serve.vllm.http.admitted import Admitted
from loraf_serve.vllm.http.app import EngineApp

_PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}
_EVENTS = "text/event-stream"
_ERROR = b'data: {"error":'
_PASSED_ON = ("content-type", "content-length")
_STREAM_HEADERS = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
_END_SECONDS = 5.0  # in which the app ends its call when the client is gone


async def answer(
    inside: Inside,
    exchange: Exchange,
    asked: Asked,
    app: EngineApp,
    allowances: Sequence[Allowance],
    valid: Sequence[GenerationRequest],
    unrendered: Unrendered | None = None,
    rendered: Callable[[Sequence[int]], GenerationRequest] | None = None,
) -> None:
    """Answers an admitted request.

    Args:
        valid: one for each prompt; empty for a chat that the app renders.
        unrendered, rendered: of such a chat: what is valid already, and what validates its prompt.

    Raises:
        Exception: the request has failed before anything was sent.
        ClientGone: the client has closed the connection; the engine has stopped working on the request.
    """
    known = unrendered or valid[0]
    call = exchange.call

    def tokens(place: int, count: int, cached: int, text: str) -> None:
        inside.generations.note_tokens(call, count, cached, "" if place else text, allowances[place])

    admitted = Admitted(
        model=asked.name.text or names.name_of(known.adapter, known.task_set),
        fingerprint=names.fingerprint(known.adapter, known.task_set),
        requests=list(valid),
        texts=asked.texts,
        rendered=rendered or (lambda _: valid[0]),
        tokens=tokens,
    )
    await exchange.while_there(app.check_form(admitted, known.sampling))
    async with exchange.parts() as parts:
        relay = _Relay(exchange, parts)
        try:
            await _run(exchange, app, admitted, asked, relay)
        finally:
            await admitted.end()
    if exchange.gone.is_set():
        raise ClientGone
    failure = await _failure(inside, admitted, relay, call.request_id)
    if failure is not None:
        await exchange.send_error(failure)
    elif relay.last is not None:
        await exchange.write(relay.last)


async def _failure(inside: Inside, admitted: Admitted, relay: _Relay, request_id: str) -> ErrorAnswer | None:
    """What has gone wrong, as the client gets it; None if nothing has. Raises it if nothing was sent yet."""
    error = admitted.error
    if error is None:
        return None if relay.error is None else answer_of_vllm(relay.error, relay.status, request_id)
    if not relay.exchange.answered:
        raise error
    # The request was valid: nothing in the error is hidden from its client.
    return answer_of(await inside.generations.shown(error, Permissions()), request_id)


async def _run(exchange: Exchange, app: EngineApp, admitted: Admitted, asked: Asked, relay: _Relay) -> None:
    """Runs the app's call to its end, also if the client goes away or this task is cancelled."""
    body = json.dumps(asked.for_app | {"model": admitted.model}).encode()
    ended = asyncio.Event()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        message: Message | None = next(messages, None)
        if message is not None:
            return message
        await ended.wait()  # the app listens for the end of the connection
        return {"type": "http.disconnect"}

    running = asyncio.create_task(app.answer(admitted, _scope(exchange, asked, len(body)), receive, relay.send))
    gone = asyncio.create_task(exchange.gone.wait())
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        relay.closed = not running.done()  # what the app still says then is no answer
        ended.set()
        if not running.done():
            await asyncio.wait({running}, timeout=_END_SECONDS)
            running.cancel()
            await asyncio.wait({running})
    if exchange.gone.is_set():
        with suppress(asyncio.CancelledError, Exception):  # nobody gets the answer
            running.result()
        return
    error = None if running.cancelled() else running.exception()
    if relay.failure is not None:
        raise relay.failure
    if isinstance(error, Exception) and admitted.error is None:
        admitted.error = error


def _scope(exchange: Exchange, asked: Asked, length: int) -> Message:
    """What the app gets of the request's head: no header of the client, some of which vLLM would obey."""
    headers = {"content-type": "application/json", "content-length": str(length)}
    request_id = exchange.call.request_id
    if request_id.isascii():
        headers["x-request-id"] = request_id
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": _PATHS[asked.is_chat],
        "raw_path": _PATHS[asked.is_chat].encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
    }


class _Relay:
    """The app's answer on its way to the client.

    Attributes:
        error: the JSON object below "error", if the app has answered with one; the client does not have it yet.
        status: of the app's answer, or of that error.
        closed: nothing is passed on any more.
        last: the last part of the body, once the app has sent it.
        failure: why the client does not get the answer.
    """

    def __init__(self, exchange: Exchange, parts: Outbox[Part]):
        self.exchange = exchange
        self._parts = parts
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.closed = False
        self.last: bytes | None = None
        self.failure: Exception | None = None
        self._headers: list[tuple[str, str]] = []
        self._refusal = b""

    async def send(self, message: Message) -> None:
        """Takes a message of the app. Raises ReadsTooSlowly."""
        if self.closed or self.exchange.gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            self._headers = [(name, value) for name, value in headers if name in _PASSED_ON]
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.status >= 400:
            self._refusal += body
            if not more:
                self.error = _error_in(self._refusal)
        elif body.startswith(_ERROR):
            self.error = _error_in(body.removeprefix(b"data: ").partition(b"\n\n")[0])
            self.status = int(self.error.get("code", 500))
        elif self.error is None and (body or not more):
            try:
                await self._pass_on(body, more)
            except (ReadsTooSlowly, ClientGone) as error:
                self.failure, self.closed = error, True
                raise  # ends the app's call

    async def _pass_on(self, body: bytes, more: bool) -> None:
        if not self.exchange.answered:
            is_stream = any(name == "content-type" and _EVENTS in value for name, value in self._headers)
            await self.exchange.start(self.status, [*self._headers, *(_STREAM_HEADERS if is_stream else ())])
        if more:
            await self._parts.put(Part(body))
        else:
            self.last = body


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    return error if isinstance(error, dict) else {"message": "an error of an unknown form"}
