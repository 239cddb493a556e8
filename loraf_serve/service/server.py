"""The server's life: listen, warm up, serve, drain.

create_server ──▶ listening, NOT_SERVING ──warm_up──▶ SERVING ──drain──▶ NOT_SERVING, finishing ──▶ stopped
                                                         └── engine gone ──▶ NOT_SERVING, UNAVAILABLE
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from loraf.errors import ConfigError, Problem
from loraf_serve.adapters.library import Library
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import Backend, BackendUnavailable
from loraf_serve.request.validation import Validator
from loraf_serve.service.admission import Admission
from loraf_serve.service.options import ServerOptions, is_loopback
from loraf_serve.service.services import AdapterService, GenerationService
from loraf_serve.service.status import ENGINE_GONE
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

log = logging.getLogger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
_CHECK_EVERY = 5.0  # seconds between looks at the engine's health
_LAST_WORDS = 1.0  # seconds for answers that are ready to leave, and for handlers that the backend has just ended
_KEEPALIVE_MS = 60_000  # a client that vanished without a word is noticed after this and the timeout
_KEEPALIVE_TIMEOUT_MS = 20_000


class Server:
    """A server that listens. `create_server` makes it.

    Attributes:
        engine_gone: the backend has said that it cannot answer any more.
    """

    def __init__(self, backend: Backend, library: Library, options: ServerOptions, vocab_size: int | None):
        self.engine_gone = False
        self._backend = backend
        self._library = library
        self._vocab_size = vocab_size
        self._admission = Admission(options.max_queue)
        self._generation = GenerationService(
            backend, library, self._admission, options.default_deadline, self._engine_is_gone
        )
        self._health = health.aio.HealthServicer()
        self._watch: asyncio.Task | None = None
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # otherwise a second server takes half of the first one's connections
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ]
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._grpc)
        adapters = AdapterService(library, self._admission, self._engine_is_gone)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if options.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)

    async def listen(self, options: ServerOptions) -> int:
        """Begins to listen; every service is NOT_SERVING. Returns the port.

        Raises:
            ConfigError: the address cannot be had.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if options.tls_cert:
                port = self._grpc.add_secure_port(options.address, _credentials(options))
            else:
                port = self._grpc.add_insecure_port(options.address)
        except RuntimeError:
            remedy = "choose another --host or --port (--port 0 takes a free one), or stop what listens there"
            problem = Problem(f"cannot listen on {options.address}", "--host, --port", remedy=remedy)
            raise ConfigError(problem) from None
        await self._grpc.start()
        return port

    async def warm_up(self) -> None:
        """Starts the backend, hands it the adapters, and begins to serve.

        Raises:
            LorafError: the model cannot be loaded, or the backend refuses an adapter.
        """
        await self._backend.start()
        await self._library.start()
        self._generation.validator = await asyncio.to_thread(Validator, self._backend, self._vocab_size)
        self._admission.open()
        if self._admission.is_open:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._watch = asyncio.create_task(self._watch_engine())

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> None:
        """Takes no more requests, lets those in flight end for `grace` seconds at most, then stops everything.

        Args:
            hurry: ends the grace early when it is set.
        """
        self._admission.close("the server is draining")
        await self._health.enter_graceful_shutdown()
        empty = asyncio.create_task(self._admission.wait_empty(grace))
        waits = {empty} | ({asyncio.create_task(hurry.wait())} if hurry else set())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._watch:
            self._watch.cancel()
        if self._admission.in_flight:
            log.warning("%d requests did not end within the grace; they are ended now", self._admission.in_flight)
        await self._library.close()
        await self._backend.stop()
        await self._admission.wait_empty(_LAST_WORDS)
        await self._grpc.stop(_LAST_WORDS)
        if hasattr(self._generation, "validator"):
            self._generation.validator.close()

    async def _engine_is_gone(self, error: BackendUnavailable) -> None:
        if self.engine_gone or not self._admission.is_open:  # said already, or draining
            return
        self.engine_gone = True
        log.error("the engine is gone, the server answers UNAVAILABLE until it is started again: %s", error)
        self._admission.close(ENGINE_GONE)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _watch_engine(self) -> None:
        while not self.engine_gone:
            await asyncio.sleep(_CHECK_EVERY)
            try:
                await self._backend.check_health()
            except BackendUnavailable as error:
                await self._engine_is_gone(error)
            except Exception:  # the look failed, not the engine: requests find out whether it lives
                log.exception("the engine's health could not be looked at")

    async def _set_health(self, state: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, state)


async def create_server(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None = None,
    root: AdapterRoot | None = None,
) -> tuple[Server, int]:
    """A server that listens but does not serve yet, and its port; `warm_up` comes next, `drain` last.

    Args:
        backend: not started.
        registry: the adapters to begin with.
        vocab_size: number of the model's token ids; None: the tokenizer's.
        root: where clients may load adapters from; None: what is loaded stays as it is.

    Raises:
        ConfigError: the options contradict each other, or the address cannot be had.
    """
    problems = options.problems()
    if problems:
        raise ConfigError(problems)
    library = Library(backend, registry, root, options.adapter_memory)
    server = Server(backend, library, options, vocab_size)
    return server, await server.listen(options)


async def run(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None,
    root: AdapterRoot | None,
    say: Callable[[str], None],
) -> int:
    """Serves until SIGTERM or SIGINT; a second one ends the grace. Returns the exit status: 1 if the engine died.

    Args:
        say: prints a line for the user.

    Raises:
        LorafError: it could not begin to serve.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, signalled)
    server, port = await create_server(backend, registry, options, vocab_size, root)
    address = f"{options.address.rpartition(':')[0]}:{port}"
    if not options.tls_cert and not is_loopback(options.host):
        say("warning: no TLS, and other machines can reach this server (--insecure)")
    say(f"loading the model; health on {address} says NOT_SERVING until it is ready")
    warming, stopping = asyncio.create_task(server.warm_up()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            await warming
            say(f"listening on {address}")
            await stopping
            say("draining")
        else:
            say("stopping before the model is loaded")
    finally:
        warming.cancel()
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # has been raised above, or was cut short
            await warming
        await server.drain(options.grace, hurry)
    say("stopped")
    return 1 if server.engine_gone else 0


def _credentials(options: ServerOptions) -> grpc.ServerCredentials:
    pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
    authority = options.tls_client_ca.read_bytes() if options.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
