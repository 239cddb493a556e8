"""The life of the server: listen, warm up, serve, drain.

create_server ──▶ listening, NOT_SERVING ──warm_up──▶ SERVING ──drain──▶ NOT_SERVING, finishing ──▶ stopped
                                                         └── engine gone ──▶ NOT_SERVING, UNAVAILABLE ──▶ stopped
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from loraf.errors import ConfigError, Problem
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.addresses import address_of, is_local
from loraf_serve.backends.backend import Backend, BackendUnavailable
from loraf_serve.observe.call import Observer
from loraf_serve.observe.metrics import LoadedAdapter, ServiceState
from loraf_serve.request.validation import Validator
from loraf_serve.security.certificates import server_credentials
from loraf_serve.security.tokens import Tokens, readable_by_others
from loraf_serve.service import access
from loraf_serve.service.accepting import make_server
from loraf_serve.service.admission import Admission
from loraf_serve.service.doors import Inside, MakeDoor
from loraf_serve.service.gate import Gate
from loraf_serve.service.generations import Generations
from loraf_serve.service.info import InfoService
from loraf_serve.service.observation import Observation
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.service.services import AdapterService, GenerationService
from loraf_serve.service.status import ENGINE_GONE
from loraf_serve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    info_pb2,
    info_pb2_grpc,
)

log = logging.getLogger(__name__)

SERVICES: tuple[str, ...] = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    info_pb2.DESCRIPTOR.services_by_name["InfoService"].full_name,
)
_HEALTH_CHECK_SECONDS = 0.5  # between checks of the engine
_LAST_ANSWERS_SECONDS = 1.0  # after the engine's death, in which probes and clients can still learn of it
_NEVER = 2**31 - 1  # milliseconds, as gRPC writes it
_FLUSH_SECONDS = 1.0  # for answers that are ready to be sent, and handlers whose backend has just stopped
_KEEPALIVE_MS = 60_000  # a client that vanished silently is noticed after this time and the timeout
_KEEPALIVE_TIMEOUT_MS = 20_000
_STREAMS = 1024  # at a time on one connection; a client's further calls wait in the client
_CLIENT_PING_MS = 5_000  # the least time between a client's own keepalive pings


class GrpcServer:
    """The gRPC server of a backend. Made by `create_server`.

    Attributes:
        tokens: who may call; None: everybody.
        engine_gone: the backend has failed for good; engine_lost: is set then.
        door_lines: where the other doors listen, for people, once they do.
    """

    def __init__(
        self,
        backend: Backend,
        library: AdapterLibrary,
        options: ServerOptions,
        vocab_size: int | None,
        tokens: Tokens | None = None,
        observers: Sequence[Observer] = (),
        doors: Sequence[MakeDoor] = (),
    ):
        self.tokens = tokens
        self.engine_gone = False
        self.engine_lost = asyncio.Event()
        self.door_lines: list[str] = []
        self._backend = backend
        self._library = library
        self._vocab_size = vocab_size
        self._admission = Admission(options.max_queue)
        self._generations = Generations(
            backend, library, self._admission, self._engine_is_gone, observers, options.log_texts
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in grpc-stubs
        self._watch: asyncio.Task[None] | None = None
        age = round(options.max_connection_age * 1000)
        self._grpc = make_server(
            interceptors=[Gate(tokens, observers)],
            options=[
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # otherwise a second server takes half of the first one's connections
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),  # without it, the timeout above has no effect
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.http2.min_ping_interval_without_data_ms", _CLIENT_PING_MS),
                # Streams that run when a connection has reached its age go on to their end.
                *([("grpc.max_connection_age_ms", age), ("grpc.max_connection_age_grace_ms", _NEVER)] if age else []),
            ],
        )
        adapters = AdapterService(library, self._admission, self._engine_is_gone)
        # Generated code for services has no types, hence the ignores.
        generation = GenerationService(self._generations, options.default_deadline)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._grpc)  # type: ignore[no-untyped-call]
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._grpc)  # type: ignore[no-untyped-call]
        info = InfoService(backend, self._admission, options)
        info_pb2_grpc.add_InfoServiceServicer_to_server(info, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        inside = Inside(
            backend,
            library,
            self._admission,
            self._generations,
            options,
            tokens,
            observers,
            self._engine_is_gone,
        )
        self._services = SERVICES
        if options.vllm_grpc:
            from loraf_serve.service.vllm_contract import contract

            self._services += contract.add(self._grpc, inside, adapters)
        if options.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self._doors = [make_door(inside) for make_door in doors]

    @property
    def registry(self) -> Registry:
        """The adapters that requests may name now."""
        return self._library.registry

    def state(self, queue_limit: int) -> ServiceState:
        """What metrics show of the server."""

        def adapters() -> list[LoadedAdapter]:
            size = self._library.resident_bytes
            return [LoadedAdapter(adapter.name, size(adapter), len(adapter.tasks)) for adapter in self.registry]

        return ServiceState(
            serving=lambda: self._admission.is_open,
            engine_up=lambda: not self.engine_gone,
            adapters=adapters,
            backend=lambda: self._backend.name,
            queue_limit=queue_limit,
        )

    async def listen(self, options: ServerOptions) -> int:
        """Starts to listen; every service is NOT_SERVING. Returns the port.

        Raises:
            ConfigError: the address is in use or not available.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.door_lines = [await door.listen() for door in self._doors]
            port = self._bind(options)
        except ConfigError:
            for door in self._doors:
                await door.stop(0.0)
            raise
        await self._grpc.start()
        return port

    def _bind(self, options: ServerOptions) -> int:
        """Returns the port. Raises ConfigError."""
        try:
            if options.tls:
                return self._grpc.add_secure_port(options.address, server_credentials(options.tls))
            return self._grpc.add_insecure_port(options.address)
        except RuntimeError:
            remedy = "choose another --host or --port (0 takes a free port), or stop the program that listens there"
            problem = Problem(f"cannot listen on {options.address}", "--host, --port", remedy=remedy)
            raise ConfigError(problem) from None

    async def warm_up(self) -> None:
        """Starts the backend, loads the adapters, and starts to serve.

        Raises:
            LorafError: the model cannot be loaded, an adapter is damaged, or the backend refuses it.
        """
        await self._backend.start()
        await self._library.start()
        self._generations.validator = await asyncio.to_thread(Validator, self._backend, self._vocab_size)
        for door in self._doors:
            await door.open()
        self._admission.open()
        if self._admission.is_open:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._watch = asyncio.create_task(self._watch_engine())

    async def drain(self, grace: float, hurry: asyncio.Event | None = None, delay: float = 0.0) -> None:
        """Refuses new requests, waits for those in flight, then stops everything.

        Args:
            grace: seconds that requests in flight may continue.
            hurry: ends the delay and the grace early when it is set.
            delay: seconds in which the server says NOT_SERVING but still accepts requests, so that a load balancer
                turns to other servers first.
        """
        await self._health.enter_graceful_shutdown()
        if delay and self._admission.is_open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for((hurry or asyncio.Event()).wait(), delay)
        self._admission.close("the server is draining")
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
        await asyncio.gather(self._grpc.stop(_FLUSH_SECONDS), *(door.stop(_FLUSH_SECONDS) for door in self._doors))
        if hasattr(self._generations, "validator"):
            self._generations.validator.close()

    async def _engine_is_gone(self, error: BackendUnavailable) -> None:
        if self.engine_gone or not self._admission.is_open:  # already known, or draining
            return
        self.engine_gone = True
        log.error("the engine is gone: %s", error)
        self._admission.close(ENGINE_GONE)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.engine_lost.set()

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
        for name in ("", *self._services):
            await self._health.set(name, state)


async def create_server(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None = None,
    root: AdapterRoot | None = None,
    observers: Sequence[Observer] = (),
    doors: Sequence[MakeDoor] = (),
) -> tuple[GrpcServer, int]:
    """Makes a server that listens but does not serve yet. Call `warm_up` next, and `drain` at the end.

    Args:
        backend: not started.
        registry: the adapters to begin with; `warm_up` reads the values of those that have none.
        vocab_size: the model's number of token ids; None for the tokenizer's.
        root: where clients may load adapters from; None: clients cannot change what is loaded.
        observers: are told of every call.
        doors: make the doors beside gRPC's.

    Returns:
        The server and its port.

    Raises:
        ConfigError: the options contradict each other, the token file cannot be used, or the address is not available.
    """
    problems = options.problems()
    if problems:
        raise ConfigError(problems)
    tokens = Tokens(options.token_file) if options.token_file else None
    library = AdapterLibrary(backend, registry, root, options.adapter_memory)
    server = GrpcServer(backend, library, options, vocab_size, tokens, observers, doors)
    return server, await server.listen(options)


async def run(
    backend: Backend,
    registry: Registry,
    options: ServerOptions,
    vocab_size: int | None,
    root: AdapterRoot | None,
    say: Callable[[str], None],
    doors: Sequence[MakeDoor] = (),
) -> int:
    """Serves until SIGTERM or SIGINT, or until the engine dies; a second signal ends the grace period.

    Args:
        say: prints a line for the user.
        doors: make the doors beside gRPC's.

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
    observation = Observation(options)
    backend.keeps_metrics = options.metrics_port is not None
    server, port = await create_server(backend, registry, options, vocab_size, root, observation.observers, doors)
    authenticate = access.metrics_reader(server.tokens) if server.tokens else None
    try:
        metrics = observation.listen(server.state(options.max_queue), authenticate)
    except ConfigError:
        await server.drain(0.0)
        raise
    address = address_of(options.host, port)
    if not options.tls and not is_local(options.host):
        say("warning: no TLS, and other machines can reach this server (--insecure)")
    if options.token_file and readable_by_others(options.token_file):
        say(f"warning: {options.token_file}: other users of this machine can read the tokens (chmod o-r)")
    if metrics:
        say(f"metrics on {metrics}")
    say(f"loading the model; health on {address} is NOT_SERVING until it is ready")
    grace, delay = options.grace, options.drain_delay
    warming, stopping = asyncio.create_task(server.warm_up()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            await warming
            for adapter in server.registry:
                rank, tasks = adapter.manifest.rank, ", ".join(adapter.tasks)
                say(f"adapter {adapter.name}: verified, rank {rank}, digest {adapter.digest[:12]}, tasks {tasks}")
            for line in server.door_lines:
                say(line)
            say(f"listening on {address}")
            lost = asyncio.create_task(server.engine_lost.wait())
            await asyncio.wait({stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            if server.engine_gone:
                say("the engine is gone; stopping, with exit status 1")
                await asyncio.sleep(_LAST_ANSWERS_SECONDS)
                grace = delay = 0.0
            else:
                say("draining")
        else:
            say("stopping before the model is loaded")
    finally:
        warming.cancel()
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # raised above, or cancelled
            await warming
        await server.drain(grace, hurry, delay)
        observation.close()
    say("stopped")
    return 1 if server.engine_gone else 0
