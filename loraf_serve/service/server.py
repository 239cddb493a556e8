"""The life of the server: listen, warm up, serve, drain.

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
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from loraf.errors import ConfigError, Problem
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.addresses import address_of, is_local
from loraf_serve.backends.backend import Backend, BackendUnavailable
from loraf_serve.request.validation import Validator
from loraf_serve.service.admission import Admission
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.service.services import AdapterService, GenerationService
from loraf_serve.service.status import ENGINE_GONE
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

log = logging.getLogger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
_HEALTH_CHECK_SECONDS = 5.0  # between checks of the engine
_FLUSH_SECONDS = 1.0  # for answers that are ready to be sent, and handlers whose backend has just stopped
_KEEPALIVE_MS = 60_000  # a client that vanished silently is noticed after this time and the timeout
_KEEPALIVE_TIMEOUT_MS = 20_000


class GrpcServer:
    """The gRPC server of a backend. Made by `create_server`.

    Attributes:
        engine_gone: the backend has failed for good.
    """

    def __init__(self, backend: Backend, library: AdapterLibrary, options: ServerOptions, vocab_size: int | None):
        self.engine_gone = False
        self._backend = backend
        self._library = library
        self._vocab_size = vocab_size
        self._admission = Admission(options.max_queue)
        self._generation = GenerationService(
            backend, library, self._admission, options.default_deadline, self._engine_is_gone
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in grpc-stubs
        self._watch: asyncio.Task[None] | None = None
        self._grpc = aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # otherwise a second server takes half of the first one's connections
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ]
        )
        adapters = AdapterService(library, self._admission, self._engine_is_gone)
        # Generated code for services has no types, hence the ignores.
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._grpc)  # type: ignore[no-untyped-call]
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if options.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)

    @property
    def registry(self) -> Registry:
        """The adapters that requests may name now."""
        return self._library.registry

    async def listen(self, options: ServerOptions) -> int:
        """Starts to listen; every service is NOT_SERVING. Returns the port.

        Raises:
            ConfigError: the address is in use or not available.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if options.tls_cert:
                port = self._grpc.add_secure_port(options.address, _credentials(options))
            else:
                port = self._grpc.add_insecure_port(options.address)
        except RuntimeError:
            remedy = "choose another --host or --port (0 takes a free port), or stop the program that listens there"
            problem = Problem(f"cannot listen on {options.address}", "--host, --port", remedy=remedy)
            raise ConfigError(problem) from None
        await self._grpc.start()
        return port

    async def warm_up(self) -> None:
        """Starts the backend, loads the adapters, and starts to serve.

        Raises:
            LorafError: the model cannot be loaded, an adapter is damaged, or the backend refuses it.
        """
        await self._backend.start()
        await self._library.start()
        self._generation.validator = await asyncio.to_thread(Validator, self._backend, self._vocab_size)
        self._admission.open()
        if self._admission.is_open:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._watch = asyncio.create_task(self._watch_engine())

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> None:
        """Refuses new requests, waits for those in flight, then stops everything.

        Args:
            grace: seconds that requests in flight may continue.
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
            log.warning("%d requests did not end within the grace period and are aborted", self._admission.in_flight)
        await self._library.close()
        await self._backend.stop()
        await self._admission.wait_empty(_FLUSH_SECONDS)
        await self._grpc.stop(_FLUSH_SECONDS)
        if hasattr(self._generation, "validator"):
            self._generation.validator.close()

    async def _engine_is_gone(self, error: BackendUnavailable) -> None:
        if self.engine_gone or not self._admission.is_open:  # already known, or draining
            return
        self.engine_gone = True
        log.error("the engine is gone; the server answers UNAVAILABLE until it is restarted: %s", error)
        self._admission.close(ENGINE_GONE)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _watch_engine(self) -> None:
        while not self.engine_gone:
            await asyncio.sleep(_HEALTH_CHECK_SECONDS)
            try:
                await self._backend.check_health()
            except BackendUnavailable as error:
                await self._engine_is_gone(error)
            except Exception:  # the check failed, not the engine: requests will show whether it works
                log.exception("the engine's health could not be checked")

    async def _set_health(self, state: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, state)


async def create_server(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None = None,
    root: AdapterRoot | None = None,
) -> tuple[GrpcServer, int]:
    """Makes a server that listens but does not serve yet. Call `warm_up` next, and `drain` at the end.

    Args:
        backend: not started.
        registry: the adapters to begin with; `warm_up` reads the values of those that have none.
        vocab_size: the model's number of token ids; None for the tokenizer's.
        root: where clients may load adapters from; None: clients cannot change what is loaded.

    Returns:
        The server and its port.

    Raises:
        ConfigError: the options contradict each other, or the address is not available.
    """
    problems = options.problems()
    if problems:
        raise ConfigError(problems)
    library = AdapterLibrary(backend, registry, root, options.adapter_memory)
    server = GrpcServer(backend, library, options, vocab_size)
    return server, await server.listen(options)


async def run(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None,
    root: AdapterRoot | None,
    say: Callable[[str], None],
) -> int:
    """Serves until SIGTERM or SIGINT; a second signal ends the grace period.

    Args:
        say: prints a line for the user.

    Returns:
        The exit status: 0, or 1 if the engine died.

    Raises:
        LorafError: the server could not start to serve.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    server, port = await create_server(backend, registry, options, vocab_size, root)
    address = address_of(options.host, port)
    if not options.tls_cert and not is_local(options.host):
        say("warning: no TLS, and other machines can reach this server (--insecure)")
    say(f"loading the model; health on {address} is NOT_SERVING until it is ready")
    warming, stopping = asyncio.create_task(server.warm_up()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            await warming
            for adapter in server.registry:
                rank, tasks = adapter.manifest.rank, ", ".join(adapter.tasks)
                say(f"adapter {adapter.name}: verified, rank {rank}, digest {adapter.digest[:12]}, tasks {tasks}")
            say(f"listening on {address}")
            await stopping
            say("draining")
        else:
            say("stopping before the model is loaded")
    finally:
        warming.cancel()
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # raised above, or cancelled
            await warming
        await server.drain(options.grace, hurry)
    say("stopped")
    return 1 if server.engine_gone else 0


def _credentials(options: ServerOptions) -> grpc.ServerCredentials:
    assert options.tls_cert and options.tls_key  # both or neither, see ServerOptions.problems
    pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
    authority = options.tls_client_ca.read_bytes() if options.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
