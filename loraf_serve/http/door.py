"""The HTTP door: its socket, its TLS, and its life within the service's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import partial

import uvicorn

from loraf_serve.addresses import DEFAULT_HOST, address_of, is_socket, listening_socket
from loraf_serve.http import page
from loraf_serve.http.answering import Answering
from loraf_serve.http.connections import Connection
from loraf_serve.http.gate import Gate
from loraf_serve.http.models import Models
from loraf_serve.http.origins import Origins
from loraf_serve.http.routes import Route, Routes
from loraf_serve.security.contexts import CurrentContext
from loraf_serve.service.doors import Door, Inside, MakeDoor

logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the service says itself when it begins and ends

_BACKLOG = 1024
_MORE_CONNECTIONS = 256  # than requests in flight are admitted: idle ones, and calls that are no requests for answers
_KEEP_ALIVE_SECONDS = 30


def door(port: int, allowed_origins: tuple[str, ...] = (), tool_parser: str = "") -> MakeDoor:
    """Returns what makes the door.

    Args:
        port: 0 takes a free one.
        allowed_origins: origins of pages that may call, beside the door's own.
        tool_parser: vLLM's name of a parser for calls of tools; "" for none.
    """
    return partial(HttpDoor, port=port, allowed_origins=allowed_origins, tool_parser=tool_parser)


class HttpDoor(Door):
    """OpenAI's API over HTTP/1.1, and the page.

    Attributes:
        port: where it listens, once it does.
    """

    def __init__(self, inside: Inside, port: int, allowed_origins: tuple[str, ...] = (), tool_parser: str = ""):
        self._inside = inside
        self.port = port
        host = inside.options.host
        self._host = DEFAULT_HOST if is_socket(host) else host
        self._answering = Answering(inside, tool_parser)
        self._origins = Origins(self._host, allowed_origins)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def _routes(self) -> Routes:
        models = Models(self._inside)
        return Routes(
            [
                Route("POST", "/v1/completions", self._answering.completions),
                Route("POST", "/v1/chat/completions", self._answering.chats),
                Route("GET", "/v1/models", models.list),
                Route("GET", "/v1/models/{model}", models.one),
                Route("GET", "/loraf/v1/server", models.server),
                Route("GET", "/loraf/v1/adapters", models.adapters),
                Route("GET", "/loraf/v1/adapters/{name}/report", models.report),
                Route("GET", "/health", models.health, is_observed=False),
                Route("GET", "/", page.index, is_observed=False),
                Route("GET", "/page/{file}", page.file, is_observed=False),
            ]
        )

    async def listen(self) -> str:
        tls = self._inside.options.tls
        listening = listening_socket(self._host, self.port, "--http-port", _BACKLOG)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            Gate(self._inside, self._routes(), self._origins),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=self._inside.options.max_queue + _MORE_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        config.load()
        config.ssl = CurrentContext(tls).for_good() if tls else None
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listening]))
        return f"OpenAI's API on {'https' if tls else 'http'}://{address_of(self._host, self.port)}"

    async def open(self) -> None:
        await self._answering.open()

    async def stop(self, seconds: float) -> None:
        if self._server is None or self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = 1 if seconds else 0
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            await self._serving
        self._server = None


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
