"""`--adapter-memory`: what counts, and what is refused before it is read."""

from __future__ import annotations

import gc
import shutil
import tracemalloc

import pytest

from loraf.checkpoint import Checkpoint
from loraf_serve.adapters.registry import Registry
from loraf_serve.errors import AdapterMemoryFull
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, on_a_loop, open_adapter
from tests.loraf_serve.library_stand import FIRST, SECOND, THIRD, digest, file_bytes, library, quiet


@on_a_loop
async def test_an_adapter_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    shutil.copytree(checkpoint_folder(), tmp_path / "large")
    (tmp_path / "large/tasks/math.safetensors").unlink()  # who reads it would find that out
    async with library(root=tmp_path, memory=file_bytes(FIRST) - 1) as (made, backend):
        with pytest.raises(
            AdapterMemoryFull, match=r"takes [\d.]+ kB, and 0 B of the [\d.]+ kB for all adapters are taken"
        ):
            await made.load("a", "large")
        assert not made.registry and not backend.history


@on_a_loop
async def test_memory_of_the_backend_counts_and_a_load_beyond_the_limit_is_undone():
    backend = FakeBackend()
    backend.bytes_each = 1 << 20
    memory = file_bytes(FIRST) + backend.bytes_each
    async with library(backend, memory=memory - 1000) as (made, _):  # a file is a little larger than what it holds
        await made.load("a", *FIRST)
        with pytest.raises(AdapterMemoryFull):
            await made.load("b", *SECOND)
        assert [adapter.name for adapter in made.registry] == ["a"] and len(backend.history) == 1
    backend = FakeBackend()
    backend.bytes_each = memory
    async with library(backend, memory=memory) as (made, _):
        with pytest.raises(AdapterMemoryFull):
            await made.load("a", *FIRST)
        assert [what for what, _ in backend.history] == ["add", "remove"] and not made.registry


@on_a_loop
async def test_old_content_counts_until_it_is_freed_and_shared_content_counts_once():
    held = Checkpoint.open(checkpoint_folder()).nbytes
    async with library(memory=held + file_bytes(SECOND)) as (made, _):
        await made.load("a", *FIRST)
        with made.lease("a"):
            await made.load("a", *SECOND, replace=True)
            with pytest.raises(AdapterMemoryFull):
                await made.load("a", *THIRD, replace=True)
            assert made.registry.get("a").digest == digest(SECOND)
            await made.load("b", *FIRST)  # is still there
            await made.load("c", *SECOND)
            await made.unload("b")
        await quiet(made)
        await made.load("d", *THIRD)


@on_a_loop
async def test_adapters_beyond_the_memory_limit_are_refused_at_start():
    adapter = open_adapter("a", checkpoint_folder())
    with pytest.raises(AdapterMemoryFull, match="--adapter-memory"):
        async with library(registry=Registry([adapter]), memory=100):
            pass


@on_a_loop
async def test_changes_leave_nothing_behind():
    """Python's own count of what is allocated, after as much as before."""

    async def rounds(count: int) -> int:
        for i in range(count):
            await made.load("a", *(FIRST, SECOND)[i % 2], replace=i > 0)
            with made.lease("a"):
                await made.load("b", *THIRD, replace=i > 0)
            await quiet(made)
        await made.unload("a")
        await made.unload("b")
        backend.history.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async with library() as (made, backend):
        tracemalloc.start()
        try:
            before = await rounds(5)
            grown = await rounds(25) - before
        finally:
            tracemalloc.stop()
        # Bytes. Python's free lists grow by a third of this; an adapter's manifest kept at each load would be far more.
        assert grown < 100_000
