"""Adapters while the server runs: what each name means now, which content requests still need, what may be freed.

    start: registry ─▶ read, verify (thread, or backend) ─▶ Backend.add_adapter
    load ─▶ find, check, read, verify (thread, or backend) ─▶ Backend.add_adapter ─▶ the name means it (atomic)
    unload, or replaced ─▶ the name is gone ─┐
    last lease of the content ends ──────────┴─▶ Backend.remove_adapter

Content is identified by its adapter digest. Under two names it is held once. It is freed once, when no name means it
and no request that began on it still runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

from loraf.errors import CheckpointError, LorafError, Problem
from loraf.four_bits import four_bit_note
from loraf.system import trim_heap
from loraf.tasksets import NAME_PATTERN, name_problem
from loraf.units import size_text
from loraf_serve.adapters.checkpoint_folder import read_values
from loraf_serve.adapters.priority import step_back
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot, path_problem
from loraf_serve.backends.backend import Backend, BackendUnavailable, ServedAdapter
from loraf_serve.errors import AdapterMemoryFull, InvalidRequest, LoadingOff, NameTaken

log = logging.getLogger(__name__)
T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True)
class Unloaded:
    """An adapter that has lost its name, and what still needs its content. If nothing does, its memory has been freed.

    Attributes:
        running: number of requests that still run on it.
        other_names: other names of the same content.
    """

    adapter: ServedAdapter
    running: int
    other_names: tuple[str, ...]


class AdapterLibrary:
    """Used on one asyncio loop.

    Args:
        registry: the adapters to begin with; `start` reads those that have no values.
        root: where clients may load from; None: clients can neither load nor unload.
        memory: limit in bytes for all content, in this process and in the backend; None: no limit.

    Attributes:
        registry: what each name means now. Every change replaces it with another Registry.
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
        self._leases: Counter[str] = Counter()  # by digest: running requests
        self._changing = asyncio.Lock()  # the backend's content changes in one place at a time
        self._changes: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.Task[None] | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=step_back)

    async def start(self) -> None:
        """Reads the registry's adapters and hands them to the backend, which has started.

        Raises:
            CheckpointError: checkpoints that are damaged or that the backend refuses; all of them are named.
            LorafError: there is not enough memory, or the backend fails its self-check.
        """
        errors = []
        for adapter in self.registry:
            try:
                adapter = await self._with_values(adapter)
                await self._hold(adapter)
            except CheckpointError as error:
                errors.append(error)
            else:
                self.registry = self.registry.with_adapter(adapter)
                _note_quantised(adapter)
        if len(errors) > 1:
            raise CheckpointError(problem for error in errors for problem in error.problems)
        if errors:
            raise errors[0]

    async def _with_values(self, adapter: ServedAdapter) -> ServedAdapter:
        """Reads an adapter at start, unless the backend will or the same folder has been read for another name."""
        held = self._held.get(adapter.digest)
        is_read = adapter.checkpoint is not None
        if held is not None and held.path == adapter.path:
            return dataclasses.replace(adapter, checkpoint=held.checkpoint)
        # The backend will not read a copy of content that it holds, but damage must still be found.
        if not is_read and (held is not None or not self._backend.reads_checkpoints):
            adapter = await asyncio.to_thread(read_values, adapter)
        return self._without_values(adapter)

    def _without_values(self, adapter: ServedAdapter) -> ServedAdapter:
        """Drops values that this process does not need."""
        return dataclasses.replace(adapter, checkpoint=None) if self._backend.reads_checkpoints else adapter

    async def close(self) -> None:
        """Cancels changes that are under way. The backend is about to be stopped, which frees everything it holds."""
        self._closed = True
        changes = list(self._changes)
        for change in changes:
            change.cancel()
        await asyncio.gather(*changes, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def lease(
        self, name: str, visible: Callable[[Registry], Registry] = lambda registry: registry
    ) -> Iterator[Registry]:
        """Yields the adapters that a request may name now. Until the context ends, the backend keeps the one that
        `find(name)` returns.

        Args:
            visible: leaves out the adapters that the request's client may not use.
        """
        registry = visible(self.registry)
        try:
            adapter = registry.find(name)
        except LorafError:  # validation reports it
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
        """Bytes that the adapter's content takes now, in this process and in the backend."""
        return adapter.resident_bytes + (self._backend.adapter_bytes(adapter) if adapter.digest in self._held else 0)

    def path_below_root(self, path: str) -> str:
        """An absolute path below the root, relative to it; any other path as it is, also without a root."""
        return path if self._root is None else self._root.relative(path)

    def shown_path(self, adapter: ServedAdapter) -> str:
        """Where the adapter's checkpoint lies, as clients may see it: below the root, or the name of its folder."""
        below = self.path_below_root(str(adapter.path))
        return adapter.path.name if os.path.isabs(below) else below

    async def load(self, name: str, path: str, tasks: Sequence[str] = (), replace: bool = False) -> ServedAdapter:
        """Makes a name mean a checkpoint. If it raises or is cancelled, nothing has changed.

        Args:
            path: relative to the root.
            tasks: the tasks to read; empty for all.
            replace: allow a name that is taken.

        Raises:
            LoadingOff: there is no root.
            InvalidRequest: an invalid name, path or task; all mistakes at once.
            NameTaken: the name is taken and `replace` is not set.
            AdapterMemoryFull: the adapter does not fit in the memory limit.
            LorafError: as `AdapterRoot.find`, `AdapterRoot.open`, `Backend.add_adapter`.
            BackendUnavailable: the engine is gone.
        """
        root = self._require_root()
        problems = [p for p in (name_problem(name, "adapter"), path_problem(path)) if p] + _task_problems(tasks)
        if problems:
            raise InvalidRequest(problems)
        # The change is completed or undone as a whole, even if the caller goes away in the middle.
        given_up = asyncio.Event()
        change = self._begin(self._load(root, name, path, tasks, replace, given_up))
        try:
            return await asyncio.shield(change)
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def unload(self, name: str) -> Unloaded:
        """Removes a name at once. Waits until the memory is freed, unless something still needs the content.

        Raises:
            LoadingOff: there is no root.
            UnknownTask: there is no such adapter.
            BackendUnavailable: the engine is gone; the name has been removed.
        """
        self._require_root()
        adapter = self.registry.get(name)
        self.registry = self.registry.without(name)
        log.info("adapter %s (%.12s) unloaded", name, adapter.digest)
        unloaded = Unloaded(adapter, self._leases[adapter.digest], self.registry.named(adapter.digest))
        freeing = self._free_soon()
        if freeing and not (unloaded.running or unloaded.other_names):
            await asyncio.shield(freeing)
        return unloaded

    async def _load(
        self, root: AdapterRoot, name: str, path: str, tasks: Sequence[str], replace: bool, given_up: asyncio.Event
    ) -> ServedAdapter:
        def stop_if_given_up() -> None:
            if given_up.is_set():
                raise asyncio.CancelledError

        try:
            async with self._changing:
                stop_if_given_up()
                if name in self.registry and not replace:
                    message, remedy = f"the name {name!r} is taken", "set replace, or choose another name"
                    raise NameTaken(Problem(message, "name", remedy=remedy))
                checkpoint = await self._run(root.find, path, tasks)
                self.registry.operator_sets.require_free_names(checkpoint.served_as(name))
                stop_if_given_up()
                held = checkpoint.manifest.adapter_digest in self._held
                if not held:
                    self._require_room(checkpoint.served_as(name).file_bytes)
                # The backend will not read a copy of content that it holds, but damage must still be found.
                adapter = await self._run(root.open, name, checkpoint, self._backend.reads_checkpoints and not held)
                adapter = self._without_values(adapter)
                stop_if_given_up()
                await self._hold(adapter)
                stop_if_given_up()
                self.registry = self.registry.with_adapter(adapter)
        except LorafError as error:
            raise root.shown(error) from error
        finally:
            self._free_soon()  # the content that was replaced, or that of a load that was given up
        log.info("adapter %s (%.12s) loaded, tasks %s", name, adapter.digest, ", ".join(adapter.tasks))
        _note_quantised(adapter)
        return adapter

    async def _hold(self, adapter: ServedAdapter) -> None:
        """Hands content to the backend, unless it has it. Raises AdapterMemoryFull, and what the backend raises."""
        held = self._held.get(adapter.digest)
        if held:
            if adapter.checkpoint and held.checkpoint:
                adapter.checkpoint.tasks = held.checkpoint.tasks  # equal bytes, kept once
            return
        await self._backend.add_adapter(adapter)
        try:
            self._require_room(adapter.resident_bytes + self._backend.adapter_bytes(adapter))
        except AdapterMemoryFull:
            await self._backend.remove_adapter(adapter)
            raise
        self._held[adapter.digest] = adapter

    def _require_room(self, needed: int) -> None:
        taken = sum(self.resident_bytes(adapter) for adapter in self._held.values())
        if self._memory is not None and taken + needed > self._memory:
            message = (
                f"this adapter takes {size_text(needed)}, and {size_text(taken)} of the {size_text(self._memory)} for "
                "all adapters are taken"
            )
            remedy = "unload an adapter, wait for requests on replaced ones to end, or raise --adapter-memory"
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

    def _free_soon(self) -> asyncio.Task[None] | None:
        """Starts a task that frees unneeded content; None if there is none."""
        if self._closed or not self._unneeded():
            return None
        if self._sweep is None or self._sweep.done():
            self._sweep = self._begin(self._free())
        return self._sweep

    async def _free(self) -> None:
        """Frees all unneeded content, then raises the backend's first failure, if there was one."""
        failures: list[Exception] = []
        async with self._changing:  # while it is held, unneeded content stays unneeded
            while unneeded := self._unneeded():
                try:
                    await self._backend.remove_adapter(self._held[unneeded[0]])
                    log.info("content %.12s freed", unneeded[0])
                except Exception as error:
                    failures.append(error)
                finally:
                    del self._held[unneeded[0]]
                await self._run(trim_heap)
        if failures:
            raise failures[0]

    async def _run(self, function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task that runs to its end even if nothing awaits it."""
        change = asyncio.create_task(work)
        self._changes.add(change)

        def when_done(change: asyncio.Task[T]) -> None:
            self._changes.discard(change)
            error = None if change.cancelled() else change.exception()
            if isinstance(error, LorafError | BackendUnavailable):
                log.info("an adapter change failed: %s", error)
            elif error is not None:
                log.error("an adapter change failed", exc_info=error)

        change.add_done_callback(when_done)
        return change


def _task_problems(tasks: Sequence[str]) -> list[Problem]:
    problems = []
    seen: set[str] = set()
    for i, task in enumerate(tasks):
        field = f"tasks[{i}]"
        if not NAME_PATTERN.fullmatch(task):
            problems.append(Problem(f"{task!r} is not a task name", field, remedy="name tasks of the checkpoint"))
        elif task in seen:
            problems.append(Problem(f"task {task!r} is named twice", field, remedy="name each task once"))
        seen.add(task)
    return problems


def _note_quantised(adapter: ServedAdapter) -> None:
    """Says in the log if the adapter was trained on a quantised base: the server's may have other weights."""
    note = four_bit_note(adapter.manifest.tasks)
    if note:
        log.warning("adapter %s: %s", adapter.name, note)
