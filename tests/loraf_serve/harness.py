"""A model, checkpoints and a running server for the service's tests. The server is real, on a port of its own; its loop
runs in a thread, so that tests use grpc's ordinary client."""

from __future__ import annotations

import asyncio
import atexit
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path

import grpc

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.manifest import Templates
from loraf_serve.adapters import registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import Backend
from loraf_serve.client import Client
from loraf_serve.service import server
from loraf_serve.service.options import ServerOptions
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
    """Holds every `checkpoint_folder`."""
    return _root() / "checkpoints"


@cache
def model_folder() -> Path:
    return make_model("mistral", _root() / "model")


def checkpoint_folder(seed: int = 0) -> Path:
    """A random checkpoint for the model; each task is marked as trained on top of those before it."""
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


@cache
def one_adapter() -> registry.Registry:
    """`trio`, with all tasks."""
    return registry.open_all([f"trio={checkpoint_folder()}"], model_folder())


@cache
def two_adapters() -> registry.Registry:
    """`trio`, and `pair` with two tasks of another checkpoint."""
    texts = [f"trio={checkpoint_folder()}", f"pair={checkpoint_folder(1)}@nlu+code"]
    return registry.open_all(texts, model_folder())


class Running:
    """A server in a thread.

    Attributes:
        client: loraf's own client; `channel`, `generation`, `adapters`: grpc's.
    """

    def __init__(self, backend: FakeBackend, running: server.Server, port: int, loop: asyncio.AbstractEventLoop):
        self.backend, self.server, self.port, self.loop = backend, running, port, loop
        self.address = f"127.0.0.1:{port}"
        self.client = Client(self.address)
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
    adapters: registry.Registry | None = None,
    warm: bool = True,
    root: Path | None = None,
    **options,
) -> Iterator[Running]:
    """A server with `one_adapter`, warmed up unless `warm` is False; drained at the end without grace.

    Args:
        root: `--adapter-root`.
    """
    chosen = replace(ServerOptions(port=0, grace=0.0), **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin():
        made = backend() if callable(backend) else backend
        known = one_adapter() if adapters is None else adapters
        where = None if root is None else AdapterRoot(root, model_folder())
        running, port = await server.create_server(made, known, chosen, VOCAB_SIZE, where)
        if warm:
            await running.warm_up()
        return Running(made, running, port, loop)

    try:
        running = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        try:
            yield running
        finally:
            running.client.close()
            running.channel.close()
            running.call(running.server.drain(0.0))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def on_a_loop(test: Callable[..., Coroutine]) -> Callable[..., None]:
    """A test that is a coroutine."""

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
