"""Adapters while the server runs: what each name means now, which content requests still need, what may be freed.

    load ─▶ find, read, verify (thread, or backend) ─▶ Backend.add_adapter ─▶ the name means it     one step of the loop
    unload, or replaced ─▶ no name ─┐
    last lease of the content ends ─┴─▶ Backend.remove_adapter

Content is told apart by its digest. Under two names it is held once; it is freed once, when no name means it and no
request that began on it still runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from loraf.errors import LorafError, Problem
from loraf.tasksets import NAME_PATTERN, name_problem
from loraf_serve.adapters.memory import give_back, size_text
from loraf_serve.adapters.priority import step_back
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot, path_problem
from loraf_serve.backends.backend import Backend, BackendUnavailable, ServedAdapter
from loraf_serve.errors import AdapterMemoryFull, InvalidRequest, LoadingOff, NameTaken

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Unloaded:
    """What keeps the content of an adapter that has lost its name; if nothing does, its memory has been freed.

    Attributes:
        running: requests that still run on it.
        other_names: names that still mean it.
    """

    adapter: ServedAdapter
    running: int
    other_names: tuple[str, ...]


class Library:
    """Used on one asyncio loop.

    Args:
        registry: what is there at start.
        root: where clients may load from; None: they may change nothing.
        memory: bytes that all content may take, in this process and in the backend; None: no limit.

    Attributes:
        registry: what each name means now. Replaced whole at each change.
    """

    def __init__(
        self,
        backend: Backend,
        registry: Registry,
        root: AdapterRoot | None = None,
        memory: int | None = None,
    ):
        self.registry = registry
        self._backend = backend
        self._root = root
        self._memory = memory
        self._held: dict[str, ServedAdapter] = {}  # by digest: what the backend has
        self._leases: Counter[str] = Counter()  # by digest: requests that run
        self._changing = asyncio.Lock()  # one change of what the backend has at a time
        self._changes: set[asyncio.Task] = set()
        self._sweep: asyncio.Task | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=step_back)

    async def start(self) -> None:
        """Hands the backend, which has started, what the registry has.

        Raises:
            LorafError: the backend refuses an adapter, or there is not enough memory.
        """
        for adapter in self.registry:
            await self._hold(adapter)

    async def close(self) -> None:
        """Ends changes in the middle: the backend is about to be stopped, and takes everything with it."""
        self._closed = True
        changes = list(self._changes)
        for change in changes:
            change.cancel()
        await asyncio.gather(*changes, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def lease(self, name: str) -> Iterator[Registry]:
        """The registry as it is now. Until the end, what `find(name)` gives of it stays in the backend."""
        registry = self.registry
        try:
            adapter = registry.find(name)
        except LorafError:  # whoever looks into the registry says so
            adapter = None
        if adapter is None:
            yield registry
            return
        digest = adapter.digest
        self._leases[digest] += 1
        try:
            yield registry
        finally:
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
                self._free_soon()

    def resident_bytes(self, adapter: ServedAdapter) -> int:
        """What the adapter's content takes now, in this process and in the backend."""
        return adapter.resident_bytes + (self._backend.adapter_bytes(adapter) if adapter.digest in self._held else 0)

    async def load(self, name: str, path: str, tasks: Sequence[str] = (), replace: bool = False) -> ServedAdapter:
        """Makes a name mean a checkpoint. If it raises, or is cancelled, everything stays as it was.

        Args:
            path: below the root.
            tasks: the tasks to read; empty: all.
            replace: the name may be taken.

        Raises:
            LoadingOff: there is no root.
            InvalidRequest: a name, path or task that cannot be one; all mistakes at once.
            NameTaken: and `replace` is not set.
            AdapterMemoryFull: there is no room.
            LorafError: as `AdapterRoot.find`, `AdapterRoot.open`, `Backend.add_adapter`.
            BackendUnavailable: the engine is gone.
        """
        root = self._require_root()
        problems = [p for p in (name_problem(name, "adapter"), path_problem(path)) if p] + _task_problems(tasks)
        if problems:
            raise InvalidRequest(problems)
        # Carried to its end or taken back whole, even when the caller goes away in the middle.
        given_up = asyncio.Event()
        change = self._begin(self._load(root, name, path, tasks, replace, given_up))
        try:
            return await asyncio.shield(change)
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def unload(self, name: str) -> Unloaded:
        """Takes a name away at once. Waits until the memory is freed, unless something still needs the content.

        Raises:
            LoadingOff: there is no root.
            UnknownTask: there is no such adapter.
            BackendUnavailable: the engine is gone; so is the name.
        """
        self._require_root()
        adapter = self.registry.get(name)
        self.registry = self.registry.without(name)
        log.info("adapter %s (%.12s) unloaded", name, adapter.digest)
        found = Unloaded(adapter, self._leases[adapter.digest], self.registry.named(adapter.digest))
        freeing = self._free_soon()
        if freeing and not (found.running or found.other_names):
            await asyncio.shield(freeing)
        return found

    async def _load(
        self, root: AdapterRoot, name: str, path: str, tasks: Sequence[str], replace: bool, given_up: asyncio.Event
    ) -> ServedAdapter:
        def go_on() -> None:
            if given_up.is_set():
                raise asyncio.CancelledError

        try:
            async with self._changing:
                go_on()
                if name in self.registry and not replace:
                    message, remedy = f"the name {name!r} is taken", "set replace, or choose another name"
                    raise NameTaken(Problem(message, "name", remedy=remedy))
                found = await self._run(root.find, path, tasks)
                go_on()
                held = found.manifest.adapter_digest in self._held
                if not held:
                    self._require_room(found.file_bytes)
                # The backend reads no copy of what it holds; one that is damaged is to be found out all the same.
                adapter = await self._run(root.open, name, found, self._backend.reads_checkpoints and not held)
                if self._backend.reads_checkpoints:
                    adapter = dataclasses.replace(adapter, checkpoint=None)
                go_on()
                await self._hold(adapter)
                go_on()
                self.registry = self.registry.with_adapter(adapter)
        except LorafError as error:
            raise root.shown(error) from error
        finally:
            self._free_soon()  # the content that was replaced, or the one that was given up
        log.info("adapter %s (%.12s) loaded, tasks %s", name, adapter.digest, ", ".join(adapter.tasks))
        return adapter

    async def _hold(self, adapter: ServedAdapter) -> None:
        """Hands the content to the backend, unless it has it. Raises AdapterMemoryFull, and what the backend raises."""
        held = self._held.get(adapter.digest)
        if held:
            if adapter.checkpoint and held.checkpoint:
                adapter.checkpoint.tasks = held.checkpoint.tasks  # the same bytes: kept once
            return
        await self._backend.add_adapter(adapter)
        try:
            self._require_room(adapter.resident_bytes + self._backend.adapter_bytes(adapter))
        except AdapterMemoryFull:
            await self._backend.remove_adapter(adapter)
            raise
        self._held[adapter.digest] = adapter

    def _require_room(self, wanted: int) -> None:
        taken = sum(self.resident_bytes(adapter) for adapter in self._held.values())
        if self._memory is not None and taken + wanted > self._memory:
            message = (
                f"this adapter takes {size_text(wanted)}, and of {size_text(self._memory)} for all of them "
                f"{size_text(taken)} are taken"
            )
            remedy = "unload an adapter, wait for requests on replaced ones to end, or start the server with more"
            raise AdapterMemoryFull(Problem(message, "--adapter-memory", remedy=remedy))

    def _require_root(self) -> AdapterRoot:
        if self._root is None:
            remedy = "start the server with --adapter-root DIR"
            raise LoadingOff(Problem("clients may not load or unload adapters here", remedy=remedy))
        return self._root

    def _needed(self, digest: str) -> bool:
        return self._leases[digest] > 0 or bool(self.registry.named(digest))

    def _unneeded(self) -> list[str]:
        return [digest for digest in self._held if not self._needed(digest)]

    def _free_soon(self) -> asyncio.Task | None:
        """The task that frees what nobody needs, begun if there is something to free."""
        if self._closed or not self._unneeded():
            return None
        if self._sweep is None or self._sweep.done():
            self._sweep = self._begin(self._free())
        return self._sweep

    async def _free(self) -> None:
        """Raises the first failure of the backend, after all have been tried."""
        failures: list[Exception] = []
        async with self._changing:  # while it is held, what is unneeded stays so
            while unneeded := self._unneeded():
                try:
                    await self._backend.remove_adapter(self._held[unneeded[0]])
                    log.info("content %.12s freed", unneeded[0])
                except Exception as error:
                    failures.append(error)
                finally:
                    del self._held[unneeded[0]]
                await self._run(give_back)
        if failures:
            raise failures[0]

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that nobody need wait for."""
        change = asyncio.create_task(work)
        self._changes.add(change)

        def over(change: asyncio.Task) -> None:
            self._changes.discard(change)
            error = None if change.cancelled() else change.exception()
            if isinstance(error, LorafError | BackendUnavailable):
                log.info("a change of the adapters failed: %s", error)
            elif error is not None:
                log.error("a change of the adapters failed", exc_info=error)

        change.add_done_callback(over)
        return change


def _task_problems(tasks: Sequence[str]) -> list[Problem]:
    problems = []
    seen: set[str] = set()
    for i, task in enumerate(tasks):
        field = f"tasks[{i}]"
        if not NAME_PATTERN.fullmatch(task):
            problems.append(Problem(f"{task!r} is no task name", field, remedy="name tasks of the checkpoint"))
        elif task in seen:
            problems.append(Problem(f"task {task!r} is named twice", field, remedy="name each task once"))
        seen.add(task)
    return problems
