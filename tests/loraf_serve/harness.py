"""A model, checkpoints and a running server for tests of the service. The server is real and has its own port; its loop
runs in a thread, so that tests can use grpc's blocking client."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path

import grpc

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.manifest import Templates
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder, read_values
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import Backend, ServedAdapter
from loraf_serve.client import Client
from loraf_serve.observe.call import Observer
from loraf_serve.service import server
from loraf_serve.service.doors import MakeDoor
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.v1 import adapter_pb2_grpc, generation_pb2_grpc
from tests.loraf_serve.fake_backend import FakeBackend
from tests.standins import linear_shapes, make_model, random_values

TASKS = ("math", "nlu", "code")
TEMPLATES = {
    "math": Templates("Q: {question}\nA:"),
    "nlu": Templates("{instruction} / {input}"),
    "code": Templates("no field"),
}
VOCAB_SIZE = 320  # of the stand-in model; its tokenizer has fewer tokens


@cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="loraf-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def checkpoints_root() -> Path:
    """The folder that holds every `checkpoint_folder`."""
    return _root() / "checkpoints"


@cache
def model_folder() -> Path:
    return make_model("mistral", _root() / "model")


def checkpoint_folder(seed: int = 0) -> Path:
    """A random checkpoint for the model. Each task was trained with those before it active."""
    return _checkpoint_folder(seed)


@cache
def _checkpoint_folder(seed: int, names: tuple[str, ...] = TASKS) -> Path:
    folder = checkpoints_root() / f"ckpt{seed}"
    shapes = linear_shapes(model_folder())
    checkpoint = Checkpoint.create(folder, describe("stand-in", model_folder()), 8, shapes, seed)
    values = random_values(shapes, 8, names, 0.75, seed)
    for i, name in enumerate(names):
        checkpoint.add_task(
            name,
            values[name],
            alpha=16.0,
            sparsity=0.75,
            trained_with=names[:i],
            templates=TEMPLATES[name],
        )
    return folder


def open_adapter(name: str, folder: Path, tasks: Sequence[str] | None = None) -> ServedAdapter:
    """A checked adapter with its values."""
    checkpoint = CheckpointFolder.read(folder, None if tasks is None else tuple(tasks))
    checkpoint.require_servable(model_folder())
    return read_values(checkpoint.served_as(name))


@cache
def one_adapter() -> Registry:
    """`trio`, with all tasks; the server reads the values."""
    return check_adapters([f"trio={checkpoint_folder()}"], model_folder())


@cache
def two_adapters() -> Registry:
    """`trio`, and `pair` with two tasks of another checkpoint."""
    texts = [f"trio={checkpoint_folder()}", f"pair={checkpoint_folder(1)}@nlu+code"]
    return check_adapters(texts, model_folder())


class Running:
    """A server in a thread.

    Attributes:
        client: loraf's own client; `channel`, `generation`, `adapters`: grpc's.
    """

    def __init__(self, backend: FakeBackend, running: server.GrpcServer, port: int, loop: asyncio.AbstractEventLoop):
        self.backend, self.server, self.port, self.loop = backend, running, port, loop
        self.address = f"127.0.0.1:{port}"
        self.client = Client(self.address, retries=0)
        self.channel = grpc.insecure_channel(self.address)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(self.channel)

    def call(self, coroutine, seconds: float = 20):
        """Runs a coroutine on the server's loop."""
        return self.spawn(coroutine).result(seconds)

    def spawn(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


@contextmanager
def serving(
    backend: Backend | Callable[[], Backend] = FakeBackend,
    adapters: Registry | None = None,
    warm: bool = True,
    root: Path | None = None,
    vocab_size: int | None = VOCAB_SIZE,
    doors: Sequence[MakeDoor] = (),
    observers: Sequence[Observer] = (),
    **options,
) -> Iterator[Running]:
    """A server with `one_adapter`, warmed up unless `warm` is False; drained at the end without grace.

    Args:
        root: `--adapter-root`.
        doors: make the doors beside gRPC's.
        observers: are told of every call.
    """
    server_options = replace(ServerOptions(port=0, grace=0.0), **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin():
        instance = backend() if callable(backend) else backend
        registry = one_adapter() if adapters is None else adapters
        adapter_root = None if root is None else AdapterRoot(root, model_folder())
        running, port = await server.create_server(
            instance, registry, server_options, vocab_size, adapter_root, observers, doors
        )
        if warm:
            await running.warm_up()
        return Running(instance, running, port, loop)

    try:
        running = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        try:
            yield running
        finally:
            running.client.close()
            running.channel.close()
            running.call(running.server.drain(0.0), 90)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


_counters: list[tuple[Path, Counter[str]]] = []


def _count_open(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _counters and isinstance(arguments[0], str | os.PathLike):
        path = Path(arguments[0])
        for folder, counts in _counters:
            if path.parent == folder:
                counts[path.name] += 1


@cache
def _install_audit_hook() -> None:
    """Once: an audit hook cannot be removed."""
    sys.addaudithook(_count_open)


@contextmanager
def counting_opens(folder: Path) -> Iterator[Counter[str]]:
    """Counts by name how often this process opens each file directly in `folder`."""
    _install_audit_hook()
    counter = (folder, Counter[str]())
    _counters.append(counter)
    try:
        yield counter[1]
    finally:
        _counters.remove(counter)


def on_a_loop(test: Callable[..., Coroutine]) -> Callable[..., None]:
    """Makes a test of a coroutine."""

    @wraps(test)
    def run(*arguments, **named):
        asyncio.run(test(*arguments, **named))

    return run


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `holds` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
