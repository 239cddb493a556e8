"""What every HTTP call passes before its handler, and what is noted at its end.

request ──▶ host, origin ──▶ route ──▶ observers ──▶ token ──▶ handler ──▶ answer, or an error ──▶ observers

The page's files and /health need no token and are not observed: they tell nothing, and probes carry none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from http import HTTPStatus

from loraf_serve.errors import ReadsTooSlowly
from loraf_serve.http.errors import ErrorAnswer, HttpRefusal, answer_of
from loraf_serve.http.exchange import ClientGone, Exchange, Message, Receive, Send, headers_of
from loraf_serve.http.origins import Origins
from loraf_serve.http.routes import Route, Routes
from loraf_serve.observe.call import CURRENT, Call, inform
from loraf_serve.request.validation import request_id_problem
from loraf_serve.security.permissions import Permissions
from loraf_serve.service.doors import Inside

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_ALL = Permissions()
_ALWAYS = (("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"))


class Gate:
    """The ASGI application of the door.

    Args:
        origins: which pages may call.
    """

    def __init__(self, inside: Inside, routes: Routes, origins: Origins):
        self._inside = inside
        self._routes = routes
        self._origins = origins

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"a message of ASGI that this server does not ask for: {scope['type']}")
        call = Call("", _metadata(scope))
        exchange = Exchange(scope, receive, send, call, self._inside.options.max_message_bytes)
        exchange.answer_headers += _ALWAYS
        try:
            route = self._route(exchange, call)
        except HttpRefusal as error:
            await self._refuse(exchange, answer_of(error, call.request_id))
            await exchange.finish()
            return
        try:
            if route is None:  # a browser asks whether a page of another origin may call
                await exchange.send(b"", "text/plain", HTTPStatus.NO_CONTENT)
            elif route.is_observed:
                await self._observed(exchange, call, route)
            else:
                await self._handle(exchange, call, route, lambda: _ALL)
            with contextlib.suppress(ClientGone, ReadsTooSlowly):
                await exchange.finish()
        finally:
            exchange.end()

    def _route(self, exchange: Exchange, call: Call) -> Route | None:
        """The route of a request; None for a preflight of an origin that is allowed. Raises HttpRefusal."""
        client_id = exchange.headers.get(REQUEST_ID, "")
        if client_id and not request_id_problem(client_id):
            call.request_id = client_id
        self._require_one_length(exchange)
        self._origins.require(exchange.headers, exchange.scope.get("scheme", "http"))
        origin = exchange.headers.get("origin", "")
        if self._origins.is_foreign(origin):  # and allowed
            exchange.answer_headers += self._origins.answer_headers(origin)
            if exchange.method == "OPTIONS" and "access-control-request-method" in exchange.headers:
                return None
        return self._routes.find(exchange.method, exchange.path)

    @staticmethod
    def _require_one_length(exchange: Exchange) -> None:
        """Raises HttpRefusal: a proxy and this server could disagree on where the request ends, and could take what
        follows for another client's request."""
        if "transfer-encoding" not in exchange.headers:
            return
        message = remedy = ""
        if "content-length" in exchange.headers:
            message, remedy = "stands beside Content-Length", "send one of them"
        elif exchange.scope["http_version"] != "1.1":
            message, remedy = "is not of HTTP/1.0", "send Content-Length"
        if message:
            headers = (("connection", "close"),)
            raise HttpRefusal(HTTPStatus.BAD_REQUEST, message, "INVALID_ARGUMENT", "Transfer-Encoding", remedy, headers)

    async def _observed(self, exchange: Exchange, call: Call, route: Route) -> None:
        observers = self._inside.observers
        call.method = f"{route.method} {route.path}"
        CURRENT.set(call)
        inform(observers, "began", call)
        try:
            await self._handle(exchange, call, route, lambda: self._permissions(exchange, call))
        except asyncio.CancelledError:
            call.code = "CANCELLED"
            raise
        finally:
            call.code = call.code or "OK"
            call.ended = time.perf_counter()
            inform(observers, "ended", call)

    async def _handle(
        self, exchange: Exchange, call: Call, route: Route, permissions: Callable[[], Permissions]
    ) -> None:
        try:
            await route.handler(exchange, permissions(), route.name_in(exchange.path))
        except ClientGone:
            call.code = "CANCELLED"
        except ReadsTooSlowly as error:  # an answer without its end makes uvicorn close the connection
            call.code = answer_of(error, call.request_id).code
        except Exception as error:
            await self._refuse(exchange, answer_of(error, call.request_id))

    async def _refuse(self, exchange: Exchange, answer: ErrorAnswer) -> None:
        with contextlib.suppress(ReadsTooSlowly):
            try:
                await exchange.send_error(answer)
            except ClientGone:
                exchange.call.code = "CANCELLED"

    def _permissions(self, exchange: Exchange, call: Call) -> Permissions:
        """Raises Unauthenticated."""
        tokens = self._inside.tokens
        permissions = tokens.permissions_of(exchange.headers.get("authorization")) if tokens else _ALL
        call.client = permissions.client
        exchange.connection.trust()
        return permissions


_METADATA = ("traceparent", "tracestate", "user-agent")


def _metadata(scope: Message) -> dict[str, str]:
    headers = headers_of(scope)
    return {name: headers[name] for name in _METADATA if name in headers}
