"""One request and its answer, as ASGI passes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

from loraf.errors import Problem
from loraf_serve.errors import InvalidRequest, ReadsTooSlowly
from loraf_serve.http.connections import connection_of
from loraf_serve.http.errors import JSON, ErrorAnswer, HttpRefusal
from loraf_serve.observe.call import Call
from loraf_serve.request.json_text import NotJsonError, read_object
from loraf_serve.service.outbox import STALL_SECONDS, Outbox

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[str, str]]

BODY_SECONDS = 30.0  # in which a body must arrive
_SURROGATE = b"\\ud"  # as JSON escapes one
_CLOSE = (("connection", "close"),)
_ASCII = "".join(map(chr, range(ord("!"), ord("~") + 1))).replace("%", "") + " "


class Part(NamedTuple):
    """A part of a body."""

    body: bytes

    def ByteSize(self) -> int:
        """Its size."""
        return len(self.body)


class ClientGone(Exception):
    """The client has closed the connection."""


class Exchange:
    """One request and its answer.

    Args:
        most: limit on the bytes of the body.

    Attributes:
        headers: of the request, names in lower case; the first of each name.
        connection: that the request came over.
        call: what observers see of it.
        answered: the answer has begun.
        gone: is set when the client has closed the connection; watched once the body has been read.
        answer_headers: are sent with the answer, whatever it is.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, call: Call, most: int):
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = headers_of(scope)
        self.connection = connection_of(scope)
        self.call = call
        self.answered = False
        self.gone = asyncio.Event()
        self.answer_headers: list[tuple[str, str]] = []
        self._receive = receive
        self._send = send
        self._most = most
        self._watch: asyncio.Task[None] | None = None
        self._last: bytes | None = None

    async def read_object(self) -> dict[str, Any]:
        """The body, a JSON object.

        Raises:
            HttpRefusal: it is too large, takes too long to arrive, or does not say that it is JSON.
            InvalidRequest: it is not a JSON object.
            ClientGone: it is not complete.
        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            message = f"the body is {kind[:80] or 'of no type'}"
            raise HttpRefusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message, field="Content-Type", remedy=f"send it as {JSON}"
            )
        body = await self._body()
        try:
            values = read_object(body.decode())
            if _SURROGATE in body.lower():
                json.dumps(values, ensure_ascii=False).encode()  # half of a pair is no character
            return values
        except (NotJsonError, UnicodeError) as error:
            reason = str(error) if isinstance(error, NotJsonError) else "is not UTF-8 text"
            raise InvalidRequest(Problem(f"the body {reason}", remedy="send a JSON object")) from None

    async def _body(self) -> bytes:
        length = self.headers.get("content-length", "0")
        parts: list[bytes] = []
        size, more = int(length) if length.isdecimal() else 0, True
        if size <= self._most:
            size = 0
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    while more and size <= self._most:
                        message = await self._receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        parts.append(message.get("body", b""))
                        size += len(parts[-1])
                        more = message.get("more_body", False)
            except TimeoutError:
                message_text = f"the body has not arrived within {BODY_SECONDS:g} s"
                raise HttpRefusal(
                    HTTPStatus.REQUEST_TIMEOUT, message_text, headers=(("connection", "close"),)
                ) from None
        if size > self._most:
            text, remedy = f"the body has more than {self._most} bytes", "send less: --max-message-bytes is the limit"
            raise HttpRefusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                text,
                "RESOURCE_EXHAUSTED",
                remedy=remedy,
                headers=_CLOSE,
            )
        self._watch = asyncio.create_task(self._watch_client())
        return b"".join(parts)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def end(self) -> None:
        """Stops watching the client."""
        if self._watch:
            self._watch.cancel()

    async def while_there(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, and cancels it if the client closes the connection. Raises ClientGone then."""
        working, gone = asyncio.create_task(work), asyncio.create_task(self.gone.wait())
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
        if working.cancelled():
            raise ClientGone
        await working

    async def start(self, status: int, headers: Headers) -> None:
        """Sends the head of the answer."""
        self.answered = True
        request_id = quote(self.call.request_id, safe=_ASCII)
        every = [*headers, *self.answer_headers, ("x-request-id", request_id)]
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every]
        await self._send_within({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, body: bytes, more: bool = False) -> None:
        """Sends a part of the body. The last part waits for `finish`.

        Raises:
            ReadsTooSlowly: the client has read nothing for a long time.
            ClientGone: it has closed the connection.
        """
        if more:
            await self._send_within({"type": "http.response.body", "body": body, "more_body": True})
        else:
            self._last = body

    def parts(self) -> Outbox[Part]:
        """Writes parts of the body while the next ones are made, as far as the client reads them. See `Outbox`."""

        async def write(part: Part) -> None:
            await self.write(part.body, more=True)

        return Outbox[Part](write)

    async def finish(self) -> None:
        """Sends the last part of the body: nothing is held for the request any more, so that a client that waits for
        the end of an answer finds its place free. Raises as `write`."""
        if self._last is not None:
            last, self._last = self._last, None
            await self._send_within({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_within(self, message: Message) -> None:
        if self.gone.is_set():
            raise ClientGone
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise ReadsTooSlowly(f"the client has read nothing for {STALL_SECONDS:g} s") from None

    async def send(self, body: bytes, content_type: str = JSON, status: int = 200, headers: Headers = ()) -> None:
        """Sends a whole answer."""
        await self.start(status, [("content-type", content_type), ("content-length", str(len(body))), *headers])
        await self.write(b"" if self.method == "HEAD" else body)

    async def send_json(self, value: Mapping[str, Any]) -> None:
        """Sends a JSON object."""
        await self.send(json.dumps(value).encode())

    async def send_error(self, answer: ErrorAnswer) -> None:
        """Ends the exchange with an error, also in the middle of a stream."""
        self.call.code = answer.code
        if self.answered:
            await self.write(b"data: " + answer.body + b"\n\ndata: [DONE]\n\n")
        else:
            await self.send(answer.body, status=answer.status.value, headers=answer.headers)


def headers_of(scope: Message) -> dict[str, str]:
    """The headers of a request, names in lower case; the first of each name."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return headers
