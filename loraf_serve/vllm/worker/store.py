"""Checkpoints that a vLLM worker keeps in memory, prepared for use, by adapter digest.

A checkpoint is read once, in threads next to the engine's loop, verified against the digest that the service knows, and
prepared for the backend that serves it. Its files are not opened again afterwards.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from loraf.errors import BaseMismatch, CheckpointError, ConfigError, CorruptCheckpoint, LorafError, Problem, UnknownTask
from loraf.manifest_view import CheckpointManifestView
from loraf.system import trim_heap
from loraf_serve.adapters.priority import step_back
from loraf_serve.backends.backend import NotProven, SelfCheckFailed
from loraf_serve.vllm.worker.notice import give

C = TypeVar("C", bound=CheckpointManifestView)
P = TypeVar("P")
_ERRORS = (LorafError, ConfigError, UnknownTask, CheckpointError, CorruptCheckpoint, BaseMismatch)
_KINDS: dict[str, type[LorafError]] = {kind.__name__: kind for kind in (*_ERRORS, NotProven, SelfCheckFailed)}
_SWITCH_SECONDS = 2e-4
_THREADS = "loraf"  # prefix of the names of loading threads, including those of loraf.system


class CheckpointStore(Generic[C, P]):
    """The prepared checkpoints of one worker.

    Args:
        open_: opens tasks of the checkpoint in a folder.
        prepare: turns an open checkpoint into the form that the backend serves. Runs in the loading thread, with a pool
            of similar threads. Both raise LorafError if the checkpoint is damaged or the engine cannot apply it.
        cores: processors that loading may use. Otherwise a thread would inherit vLLM's binding of the worker.
    """

    def __init__(
        self,
        open_: Callable[[str, Sequence[str]], AbstractContextManager[C]],
        prepare: Callable[[C, ThreadPoolExecutor], P],
        cores: Sequence[int] = (),
    ):
        self._open = open_
        self._prepare = prepare
        self._loads: dict[str, Future[P]] = {}
        self._cores = cores
        self._one_at_a_time = threading.Lock()
        self._full_priority = False  # loading threads have the priority of the engine's own
        self._trimmer = self._threads(1, step_back)

    def begin(self, folder: str, tasks: Sequence[str], digest: str, notice: str) -> Future[P]:
        """Starts reading a checkpoint, unless it is loaded or being read. `state` reports the outcome.

        Args:
            notice: path of a `loraf_serve.vllm.worker.notice.Notice`, given when the load is over.

        Returns:
            The load.
        """
        load = self._loads.get(digest)
        if load is None or (load.done() and load.exception() is not None):
            thread = self._threads(1)  # a new thread, because one cannot raise its priority again
            load = self._loads[digest] = thread.submit(self._load, folder, tuple(tasks), digest)
            thread.shutdown(wait=False)
            self._full_priority = True
        load.add_done_callback(lambda _: give(notice))
        return load

    def step_back(self) -> None:
        """Lowers the priority of loading threads. Call it at the beginning of a step.

        Before the first step they need equal priority, because an idle vLLM busy-waits and would take nine tenths of a
        core.
        """
        if not self._full_priority:
            return
        self._full_priority = False
        for thread in threading.enumerate():
            if thread.name.startswith(_THREADS) and thread.native_id:
                step_back(thread.native_id)

    def state(self, digest: str) -> dict[str, Any] | None:
        """Returns None while a checkpoint is loading, `{}` once it is loaded, or an error as plain values for
        `raise_error`.

        After an exception in one worker's remote call vLLM leaves the other workers' results unread, and the next call
        receives them. So errors are returned as values.
        """
        load = self._loads[digest]
        if not load.done():
            return None
        error = load.exception()
        if error is None:
            return {}
        if isinstance(error, LorafError):
            problems = [[p.message, p.field, p.file, p.remedy] for p in error.problems]
            kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS)
            return {"kind": kind, "problems": problems}
        return {"kind": "", "problems": [[f"{type(error).__name__}: {error}", "", "", ""]]}

    def get(self, digest: str) -> P:
        """Returns a loaded checkpoint.

        Raises:
            KeyError: the checkpoint is not loaded.
        """
        load = self._loads[digest]
        if not load.done() or load.exception() is not None:
            raise KeyError(digest)
        return load.result()

    def drop(self, digest: str) -> None:
        """Forgets a checkpoint. No-op if it is unknown. A thread returns its memory to the system."""
        load = self._loads.pop(digest, None)
        if load is None:
            return
        load.cancel()
        del load  # frees the checkpoint before the thread trims memory
        self._trimmer.submit(trim_heap)

    def _threads(self, count: int, prepare_thread: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
        """Returns threads with the priority of the submitting thread, unless `prepare_thread` changes it."""

        def initialize() -> None:
            if self._cores:
                os.sched_setaffinity(threading.get_native_id(), self._cores)
            _one_openmp_thread()
            prepare_thread()

        return ThreadPoolExecutor(count, thread_name_prefix=f"{_THREADS}-load", initializer=initialize)

    def _load(self, folder: str, tasks: tuple[str, ...], digest: str) -> P:
        with self._one_at_a_time:
            return self._load_now(folder, tasks, digest)

    def _load_now(self, folder: str, tasks: tuple[str, ...], digest: str) -> P:
        # Otherwise the engine's thread keeps the GIL for 5 ms each time loading requests it, thousands of times.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._open(folder, tasks) as checkpoint:
                current = checkpoint.manifest.adapter_digest
                if current != digest:
                    message = f"was changed while it was being loaded (adapter digest is now {current})"
                    remedy = "load it again once nothing writes to it"
                    raise CorruptCheckpoint(Problem(message, file=folder, remedy=remedy))
                with self._threads(len(self._cores) or os.cpu_count() or 1) as pool:
                    return self._prepare(checkpoint, pool)
        finally:
            sys.setswitchinterval(interval)


def _one_openmp_thread() -> None:
    """Limits OpenMP to one thread for the calling thread. Otherwise each loading thread gets a team of threads, which
    busy-wait and compete with the engine's own.

    vLLM disables torch.set_num_threads in its workers, so this calls torch's OpenMP runtime directly.
    """
    symbol = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if symbol is None:
        try:
            symbol = ctypes.CDLL("libgomp.so.1").omp_set_num_threads  # the one that torch has loaded
        except (OSError, AttributeError):
            return  # another OpenMP runtime, or none: loading then competes with the engine
    symbol(1)


def raise_error(state: Mapping[str, Any]) -> None:
    """Raises the error that a state from `CheckpointStore.state` describes. No-op if it describes none.

    Raises:
        LorafError: of the class that the worker raised.
        RuntimeError: the worker failed for another reason.
    """
    if "problems" not in state:
        return
    problems = [Problem(*fields) for fields in state["problems"]]
    if not state["kind"]:
        raise RuntimeError("; ".join(p.message for p in problems))
    raise _KINDS[state["kind"]](problems)
