"""Shared by tests of the adapter library: contents to load, a library with a fake backend, checks at its end."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

from loraf import manifest
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, model_folder

# (path, tasks) of four different contents
CONTENTS = (("ckpt0", ()), ("ckpt1", ()), ("ckpt0", ("math",)), ("ckpt1", ("nlu", "code")))
FIRST, SECOND, THIRD, _ = CONTENTS


def _folder(path: str) -> Path:
    return checkpoint_folder(int(path.removeprefix("ckpt")))


def digest(content) -> str:
    path, tasks = content
    whole = manifest.read(_folder(path))
    return (whole.only(tasks) if tasks else whole).adapter_digest


def file_bytes(content) -> int:
    path, tasks = content
    return sum(t.file.bytes for t in manifest.read(_folder(path)).tasks if not tasks or t.name in tasks)


@asynccontextmanager
async def library(backend: FakeBackend | None = None, root=None, memory: int | None = None, registry=None):
    """A library with a started backend. At the end, checks that it holds exactly the needed content."""
    for path, _ in CONTENTS:
        _folder(path)  # creates it
    backend = backend or FakeBackend()
    await backend.start()
    where = AdapterRoot(root or checkpoints_root(), model_folder())
    adapters = AdapterLibrary(backend, registry or Registry(), where, memory)
    await adapters.start()
    try:
        yield adapters, backend
        await quiet(adapters)
        assert backend.added == {adapter.digest for adapter in adapters.registry}
        check_history(backend)
        assert not backend.cut_off or adapters._closed, "a change was cancelled before the end"
    finally:
        await adapters.close()


async def quiet(adapters: AdapterLibrary) -> None:
    """Waits until all changes have ended."""
    async with asyncio.timeout(10):
        while adapters._changes:
            await asyncio.wait(adapters._changes)


def check_history(backend: FakeBackend) -> None:
    """Checks that each content is added and removed alternately."""
    held: Counter[str] = Counter()
    for change, digest in backend.history:
        held[digest] += 1 if change == "add" else -1
        assert held[digest] in (0, 1), backend.history


async def until(condition) -> None:
    """Waits until `condition()` is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
