"""Loading in a worker: thread priorities, notice at the end, errors as plain values."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from loraf import manifest
from loraf.checkpoint import Checkpoint
from loraf.errors import CorruptCheckpoint
from loraf_serve.vllm.worker.notice import Notice, give
from loraf_serve.vllm.worker.store import CheckpointStore, raise_error
from tests.loraf_serve.harness import checkpoint_folder, eventually


class Stand:
    """A store whose `prepare` waits for an event.

    Attributes:
        niceness: (of the loading thread, of a thread of its pool) of each load.
    """

    def __init__(self):
        self.go_on = threading.Event()
        self.reached = threading.Event()
        self.niceness: list[tuple[int, int]] = []
        self.store = CheckpointStore(self._open, self._prepare, sorted(os.sched_getaffinity(0)))
        self.folder = checkpoint_folder()
        self.digest = manifest.read(self.folder).adapter_digest

    def _open(self, folder: str, tasks):
        return nullcontext(Checkpoint.open(folder, tasks))

    def _prepare(self, checkpoint, pool: ThreadPoolExecutor) -> str:
        pool.submit(lambda: None).result()
        self.reached.set()
        assert self.go_on.wait(20)

        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        self.niceness.append((niceness(), pool.submit(niceness).result()))
        return f"{len(checkpoint.tasks)} tasks"

    def begin(self, digest: str = "", notice: str = "") -> None:
        self.store.begin(str(self.folder), ["math", "code"], digest or self.digest, notice)


@pytest.fixture
def stand():
    stand = Stand()
    yield stand
    stand.go_on.set()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities only on Linux")


def part_digest(stand: Stand) -> str:
    return manifest.read(stand.folder).only(("math", "code")).adapter_digest


@needs_linux
def test_loading_threads_lower_their_priority_at_the_first_step_until_the_next_load(stand):
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    digest = part_digest(stand)
    for steps, expected in ((0, usual), (1, 10), (0, usual)):
        stand.begin(digest)
        assert stand.reached.wait(20)
        for _ in range(steps):
            stand.store.step_back()
        stand.go_on.set()
        assert eventually(lambda: stand.store.state(digest) == {})
        assert stand.niceness.pop() == (expected, expected)
        stand.reached.clear()
        stand.go_on.clear()
        stand.store.drop(digest)
    assert os.getpriority(os.PRIO_PROCESS, 0) == usual


def test_a_checkpoint_is_available_from_its_preparation_until_it_is_dropped(stand):
    digest = part_digest(stand)
    stand.begin(digest)
    assert stand.store.state(digest) is None
    with pytest.raises(KeyError):
        stand.store.get(digest)
    stand.go_on.set()
    assert eventually(lambda: stand.store.state(digest) == {})
    stand.begin(digest)  # it is loaded already
    assert stand.store.get(digest) == "2 tasks" and len(stand.niceness) == 1
    stand.store.drop(digest)
    with pytest.raises(KeyError):
        stand.store.get(digest)


def test_a_failed_load_gives_notice_and_can_be_repeated(stand):
    stand.go_on.set()

    async def run() -> None:
        for _ in range(2):
            with Notice() as notice:
                stand.begin("0" * 64, notice.path)
                begin = time.monotonic()
                await notice.wait(20)
                assert time.monotonic() - begin < 10
            state = stand.store.state("0" * 64)
            with pytest.raises(CorruptCheckpoint, match="was changed while it was being loaded"):
                raise_error(state)

    asyncio.run(run())
    assert not stand.niceness


def test_every_load_of_the_same_content_gets_notice(stand):
    """Also a request that comes later, even after the load is over."""

    async def run() -> None:
        with Notice() as first, Notice() as second:
            stand.begin(part_digest(stand), first.path)
            stand.begin(part_digest(stand), second.path)
            stand.go_on.set()
            for notice in (first, second):
                await notice.wait(20)
                assert stand.store.state(part_digest(stand)) == {}
            with Notice() as late:
                stand.begin(part_digest(stand), late.path)
                begin = time.monotonic()
                await late.wait(20)
                assert time.monotonic() - begin < 10

    asyncio.run(run())


def test_waiting_for_notice_ends_and_leaves_no_files():
    async def run() -> None:
        with Notice() as notice:
            begin = time.monotonic()
            await notice.wait(0.05)
            assert time.monotonic() - begin >= 0.05
            await asyncio.to_thread(give, notice.path)
            await notice.wait(20)  # given before the wait
            giving = asyncio.get_running_loop().call_later(0.05, give, notice.path)
            await notice.wait(20)
            assert time.monotonic() - begin < 10 and giving.when() <= asyncio.get_running_loop().time()
            path = notice.path
        assert not os.path.exists(os.path.dirname(path))
        give(path)  # there is no waiter

    asyncio.run(run())
