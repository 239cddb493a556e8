"""The connections of the door, so that none of them can keep others out.

uvicorn would wait without end for a request's head, and refuse every request while many connections are open. Here what
a client that shows no token can hold is a connection that is closed as soon as somebody else needs its place:

    accepted ──▶ Handshake (with TLS) ──▶ Connection ──▶ a request's head ──▶ the app: trusted, holding a place
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from itertools import chain
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraf_serve.http.errors import JSON, HttpRefusal, answer_of

logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about what clients send

HEAD_SECONDS = 5.0  # from a connection's beginning, or the first byte of a request, to the end of its head
HANDSHAKE_SECONDS = 5.0
_SCOPE = "connection"  # in the state that ASGI's scope has


class Member(Protocol):
    """One of the connections."""

    @property
    def is_held(self) -> bool:
        """Whether it has a request that was admitted: it is never closed for another."""
        ...

    def give_up(self) -> None:
        """Closes it at once."""
        ...


class Crowd:
    """All connections of a door. A new one always finds a place: beyond the limit the one that has been idle for the
    longest time is closed for it, and those first that have never shown a token.

    Args:
        limit: must be more than the requests that are admitted at a time.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._strangers: dict[Member, None] = {}  # in the order of their last requests
        self._trusted: dict[Member, None] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._trusted)

    def add(self, member: Member) -> None:
        """Adds a new connection."""
        if len(self) >= self.limit:
            for other in chain(self._strangers, self._trusted):
                if not other.is_held:
                    self.remove(other)
                    other.give_up()
                    break
        self._strangers[member] = None

    def note(self, member: Member, is_trusted: bool = False) -> None:
        """A connection has been used.

        Args:
            is_trusted: from now on it counts as one that has shown a token.
        """
        if member in self._trusted or member in self._strangers:
            among = self._trusted if is_trusted or member in self._trusted else self._strangers
            self.remove(member)
            among[member] = None

    def remove(self, member: Member) -> None:
        """Forgets a connection. No-op if it is not there."""
        self._strangers.pop(member, None)
        self._trusted.pop(member, None)

    def give_up_handshakes(self) -> None:
        """Closes every connection whose TLS handshake has not ended."""
        for member in [*self._strangers]:
            if isinstance(member, Handshake):
                member.give_up()


class Connection(H11Protocol):
    """One connection over HTTP/1.1.

    Args:
        crowd: all connections of the door.
        uvicorn: what uvicorn gives a connection.

    Attributes:
        is_held: it has a request that was admitted.
    """

    def __init__(self, crowd: Crowd, **uvicorn: Any):
        super().__init__(**uvicorn)
        self.app_state = {_SCOPE: self}
        self.is_held = False
        self._crowd = crowd
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._crowd.add(self)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._is_idle():
            self._expect_head()
        super().data_received(data)
        if not self._is_idle():
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.remove(self)
        self._forget()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._crowd.note(self)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP in the form of every other error, and ends the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.give_up()
            return
        refusal = HttpRefusal(HTTPStatus.BAD_REQUEST, "this is not a request of HTTP/1.1", remedy="see RFC 9112")
        body = answer_of(refusal, "").body
        headers = [("content-type", JSON), ("content-length", str(len(body))), ("connection", "close")]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def trust(self) -> None:
        """Its client has shown a token, or the server asks for none."""
        self._crowd.note(self, is_trusted=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the context ends, the connection is not closed for another one."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False

    def give_up(self) -> None:
        """Closes the connection at once: no peer that does not answer delays it."""
        self.transport.abort()

    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self._close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self._is_idle():
            self.give_up()


def connection_of(scope: Any) -> Connection:
    """The connection of a request, from its ASGI scope."""
    connection: Connection = scope["state"][_SCOPE]
    return connection


class Handshake(asyncio.Protocol):
    """A connection until its TLS handshake has ended; then `connection` goes on with it.

    asyncio's server would tell of a connection only afterwards, and they could be without number.
    """

    is_held = False

    def __init__(self, crowd: Crowd, context: ssl.SSLContext, connection: Connection):
        self._crowd = crowd
        self._context = context
        self._connection = connection
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._crowd.add(self)
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(transport))

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.remove(self)

    def give_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except OSError:  # ssl.SSLError, a time that has passed, and a client that is gone
            secure = None
        self._crowd.remove(self)
        if secure is None or transport.is_closing():
            transport.abort()
            return
        secure.set_protocol(self._connection)
        self._connection.connection_made(secure)
        for data in self._early:
            self._connection.data_received(data)
