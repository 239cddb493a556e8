"""What tests of the library share: contents to load, a library with a fake backend, what must hold at its end."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

from loraf import manifest
from loraf_serve.adapters.library import Library
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, model_folder

# (path, tasks) of contents that are all different
CONTENTS = (("ckpt0", ()), ("ckpt1", ()), ("ckpt0", ("math",)), ("ckpt1", ("nlu", "code")))
FIRST, SECOND, THIRD, _ = CONTENTS


def _folder(path: str) -> Path:
    return checkpoint_folder(int(path.removeprefix("ckpt")))


def digest(content) -> str:
    path, tasks = content
    found = manifest.read(_folder(path))
    return (found.only(tasks) if tasks else found).adapter_digest


def file_bytes(content) -> int:
    path, tasks = content
    return sum(t.file.bytes for t in manifest.read(_folder(path)).tasks if not tasks or t.name in tasks)


@asynccontextmanager
async def library(backend: FakeBackend | None = None, root=None, memory: int | None = None, registry=None):
    """A library with a started backend; at the end nothing may be left that nobody needs."""
    for path, _ in CONTENTS:
        _folder(path)  # is there
    backend = backend or FakeBackend()
    await backend.start()
    where = AdapterRoot(root or checkpoints_root(), model_folder())
    made = Library(backend, registry or Registry(), where, memory)
    await made.start()
    try:
        yield made, backend
        await quiet(made)
        assert backend.added == {adapter.digest for adapter in made.registry}
        check_history(backend)
        assert not backend.cut_off or made._closed, "a change was cancelled before the end"
    finally:
        await made.close()


async def quiet(made: Library) -> None:
    """Until all changes have ended."""
    async with asyncio.timeout(10):
        while made._changes:
            await asyncio.wait(made._changes)


def check_history(backend: FakeBackend) -> None:
    """Each content is added, removed, added, … in turn."""
    there: Counter[str] = Counter()
    for what, digest in backend.history:
        there[digest] += 1 if what == "add" else -1
        assert there[digest] in (0, 1), backend.history


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
