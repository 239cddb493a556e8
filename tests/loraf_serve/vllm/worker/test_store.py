"""Loading in a worker: threads that step back for the engine, notice when it is over, errors as plain values."""

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
    """A store whose preparing waits until it may go on; `niceness`: of the loading thread and of one of its pool."""

    def __init__(self):
        self.go_on = threading.Event()
        self.reached = threading.Event()
        self.niceness: list[tuple[int, int]] = []
        self.store = CheckpointStore(self._opened, self._prepare, sorted(os.sched_getaffinity(0)))
        self.folder = checkpoint_folder()
        self.digest = manifest.read(self.folder).adapter_digest

    def _opened(self, folder: str, tasks):
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
    made = Stand()
    yield made
    made.go_on.set()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")


def part_digest(stand: Stand) -> str:
    return manifest.read(stand.folder).only(("math", "code")).adapter_digest


@needs_linux
def test_threads_that_load_step_back_at_the_first_step_and_come_forward_for_the_next_load(stand):
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


def test_a_checkpoint_is_there_once_it_is_prepared_and_unknown_once_it_is_dropped(stand):
    digest = part_digest(stand)
    stand.begin(digest)
    assert stand.store.state(digest) is None
    with pytest.raises(KeyError):
        stand.store.get(digest)
    stand.go_on.set()
    assert eventually(lambda: stand.store.state(digest) == {})
    stand.begin(digest)  # it is there already
    assert stand.store.get(digest) == "2 tasks" and len(stand.niceness) == 1
    stand.store.drop(digest)
    with pytest.raises(KeyError):
        stand.store.get(digest)


def test_a_failed_load_gives_notice_and_is_tried_again(stand):
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


def test_notice_of_several_loads_of_one_content(stand):
    """Who comes later is told as well, also when all is over already."""

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


def test_notice_is_waited_for_and_leaves_nothing():
    async def run() -> None:
        with Notice() as notice:
            begin = time.monotonic()
            await notice.wait(0.05)
            assert time.monotonic() - begin >= 0.05
            await asyncio.to_thread(give, notice.path)
            await notice.wait(20)  # given before
            giving = asyncio.get_running_loop().call_later(0.05, give, notice.path)
            await notice.wait(20)
            assert time.monotonic() - begin < 10 and giving.when() <= asyncio.get_running_loop().time()
            path = notice.path
        assert not os.path.exists(os.path.dirname(path))
        give(path)  # to nobody

    asyncio.run(run())
