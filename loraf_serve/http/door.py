"""The HTTP door: its socket, its TLS, and its life within the service's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import uvicorn

from loraf.errors import ConfigError
from loraf_serve.addresses import address_of, listening_socket
from loraf_serve.http import page
from loraf_serve.http.answering import Answering
from loraf_serve.http.connections import Connection, Crowd, Handshake
from loraf_serve.http.gate import Gate
from loraf_serve.http.models import Models
from loraf_serve.http.origins import Origins
from loraf_serve.http.routes import Route, Routes
from loraf_serve.security.contexts import CurrentContext
from loraf_serve.service.doors import Door, Inside, MakeDoor

logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the service says itself when it begins and ends

_BACKLOG = 1024  # connections that wait to be accepted
_AT_ONCE = 64  # that are accepted in one turn of the loop: more would exist before any is closed for them
_MORE_CONNECTIONS = 256  # than requests in flight are admitted: idle ones, and calls that are no requests for answers
_KEEP_ALIVE_SECONDS = 30
_SHARE_OF_FILES = 2  # the door's connections may be one of two of the files that the process may open


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
        self._host = inside.options.http_host
        self._answering = Answering(inside, tool_parser)
        self._origins = Origins(self._host, allowed_origins)
        self._crowd = Crowd(0)
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
        if missing := page.problems():
            raise ConfigError(missing)
        tls = self._inside.options.tls
        listening = listening_socket(self._host, self.port, "--http-port", _BACKLOG)
        self.port = listening.getsockname()[1]
        self._crowd.limit = _possible(self._inside.options.max_queue + _MORE_CONNECTIONS)
        context = CurrentContext(tls).for_good() if tls else None

        def connection(**uvicorn: Any) -> asyncio.Protocol:
            made = Connection(self._crowd, **uvicorn)
            return Handshake(self._crowd, context, made) if context else made

        config = uvicorn.Config(
            Gate(self._inside, self._routes(), self._origins),
            http=cast(Any, connection),  # called as the class that uvicorn expects
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            backlog=_AT_ONCE,
        )
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
        self._crowd.give_up_handshakes()
        with contextlib.suppress(Exception):
            await self._serving
        self._server = None


def _possible(connections: int) -> int:
    """That many connections, or as many as the process may have; raises its own limit on open files where it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections * _SHARE_OF_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        connections = min(connections, soft // _SHARE_OF_FILES)
    return connections


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the service."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # asyncio takes one number for both

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
