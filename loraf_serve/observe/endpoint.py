"""Serves metrics over HTTP: `GET /metrics`, nothing else.

In a thread of its own, so that the service answers calls while metrics are written, and metrics tell of a service that
does not answer. What clients can cost is bounded: connections, bytes of a request, seconds, and processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from loraf_serve.addresses import listening_socket
from loraf_serve.errors import PermissionDenied, Unauthenticated
from loraf_serve.security.contexts import CurrentContext
from loraf_serve.security.tls_files import TlsFiles

log = logging.getLogger(__name__)

PATH = "/metrics"
MAX_CONNECTIONS = 32
MAX_REQUEST_BYTES = 8192
SECONDS = 10.0  # for a whole request and its answer
_STOP_SECONDS = 10.0
_PAUSE_SECONDS = 0.01  # between two connections: Python's lock is shared with the service
_PAGE_SECONDS = 0.25  # a page may be as old as this
_TEXT = "text/plain; charset=utf-8"


class MetricsEndpoint:
    """An HTTP server with the metrics of some registries.

    Args:
        registries: their metrics have different names.
        host, port: where to listen; port 0 takes a free one.
        tls: certificates, read again when they have changed; None for plain HTTP.
        authenticate: called with the Authorization header, or None, in the endpoint's thread; raises Unauthenticated
            or PermissionDenied.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the address is in use or not available.
    """

    def __init__(
        self,
        registries: Sequence[CollectorRegistry],
        host: str,
        port: int,
        tls: TlsFiles | None = None,
        authenticate: Callable[[str | None], object] | None = None,
    ):
        self._metrics = _Together(registries)
        self._authenticate = authenticate
        self._socket = listening_socket(host, port, "--metrics-port", MAX_CONNECTIONS)
        self.port: int = self._socket.getsockname()[1]
        self._tls = CurrentContext(tls) if tls else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pages: dict[tuple[str, bool], bytes] = {}  # what was written last, by content type and compression
        self._pages_end = 0.0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening and ends open connections. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self._socket.close()

    async def _serve(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._stop.wait()
        for task in (accepting, *self._tasks):
            task.cancel()

    async def _accept(self) -> None:
        while True:
            await asyncio.sleep(_PAUSE_SECONDS)
            try:
                connection, _ = await self._loop.sock_accept(self._socket)
            except OSError:  # no file descriptor is left, or the client has gone
                continue
            if len(self._tasks) >= MAX_CONNECTIONS:
                connection.close()
                continue
            task = self._loop.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=MAX_REQUEST_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(SECONDS):
                transport, _ = await self._loop.connect_accepted_socket(
                    lambda: protocol, connection, ssl=self._tls.get() if self._tls else None
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
                writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # a slow client, one that went away, or no HTTP; ssl.SSLError is an OSError
        except Exception:
            log.exception("a request for metrics failed")
        finally:
            if transport:
                transport.abort()
            connection.close()

    def _response(self, head: bytes) -> bytes:
        line, _, rest = head.partition(b"\r\n")
        method, _, target = line.decode("latin-1").partition(" ")
        path, _, version = target.partition(" ")
        try:
            headers = http.client.parse_headers(io.BytesIO(rest))
        except http.client.HTTPException:
            return _message(HTTPStatus.BAD_REQUEST)
        if not version.startswith("HTTP/1."):
            return _message(HTTPStatus.BAD_REQUEST)
        if self._authenticate:
            try:
                self._authenticate(headers.get("Authorization"))
            except Unauthenticated:
                return _message(HTTPStatus.UNAUTHORIZED, ("WWW-Authenticate", "Bearer"))
            except PermissionDenied:
                return _message(HTTPStatus.FORBIDDEN)
        if path.partition("?")[0] != PATH:
            return _message(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _message(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        is_compressed = "gzip" in headers.get("Accept-Encoding", "")
        content_type, body = self._page(headers.get("Accept", ""), is_compressed)
        encoding = (("Content-Encoding", "gzip"),) if is_compressed else ()
        return _message(HTTPStatus.OK, *encoding, body=body, content_type=content_type, with_body=method == "GET")

    def _page(self, accepted: str, is_compressed: bool) -> tuple[str, bytes]:
        """The metrics and their content type. Written a few times a second at most."""
        if time.monotonic() > self._pages_end:
            self._pages.clear()
            self._pages_end = time.monotonic() + _PAGE_SECONDS
        encode, content_type = choose_encoder(accepted)
        key = content_type, is_compressed
        if key not in self._pages:
            body = encode(self._metrics)
            self._pages[key] = gzip.compress(body, 1) if is_compressed else body
        return content_type, self._pages[key]


class _Together:
    """Several registries as one."""

    def __init__(self, registries: Sequence[CollectorRegistry]):
        self._registries = tuple(registries)

    def collect(self) -> Iterator[Metric]:
        for registry in self._registries:
            yield from registry.collect()


def _message(
    status: HTTPStatus,
    *headers: tuple[str, str],
    body: bytes | None = None,
    content_type: str = _TEXT,
    with_body: bool = True,
) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close", f"Content-Type: {content_type}"]
    lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body if with_body else b"")
