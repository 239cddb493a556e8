"""Checkpoints that a vLLM worker keeps in memory, prepared for use, by adapter digest.

A checkpoint is read once, in threads beside the engine's loop, verified against the digest that the service knows, and
prepared for the backend that serves it. Afterwards no file of it is opened again.
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

from loraf.described import Described
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, CorruptCheckpoint, LorafError, Problem, UnknownTask
from loraf_serve.adapters.memory import give_back
from loraf_serve.adapters.priority import step_back
from loraf_serve.backends.backend import SelfCheckFailed
from loraf_serve.vllm.worker.notice import give

C = TypeVar("C", bound=Described)
T = TypeVar("T")
_ERRORS = (LorafError, ConfigError, UnknownTask, CheckpointError, CorruptCheckpoint, BaseMismatch, SelfCheckFailed)
_KINDS = {kind.__name__: kind for kind in _ERRORS}
_SWITCH_SECONDS = 2e-4
_THREADS = "loraf"  # how the names of threads that load begin; loraf.threads names its own so as well


class CheckpointStore(Generic[C, T]):
    """The prepared checkpoints of one worker.

    Args:
        opened: the chosen tasks of the checkpoint in a folder, for the time of the context.
        prepare: makes of such a checkpoint what the worker needs, in the loading thread. The pool is for its own use:
            threads like the loading one. Both raise LorafError, if it is not sound or the engine cannot apply it.
        cores: processors that loading may use. vLLM binds its worker to some; a thread would inherit that.
    """

    def __init__(
        self,
        opened: Callable[[str, Sequence[str]], AbstractContextManager[C]],
        prepare: Callable[[C, ThreadPoolExecutor], T],
        cores: Sequence[int] = (),
    ):
        self._opened = opened
        self._prepare = prepare
        self._loads: dict[str, Future[T]] = {}
        self._cores = cores
        self._one_at_a_time = threading.Lock()
        self._in_front = False  # threads load with the priority of the engine's own
        self._freeing = self._threads(1, step_back)

    def begin(self, folder: str, tasks: Sequence[str], digest: str, notice: str) -> Future[T]:
        """Starts to read a checkpoint, unless it is there or being read. `state` tells the outcome.

        Args:
            notice: see `loraf_serve.vllm.worker.notice`; given when there is an outcome.

        Returns:
            The load, done when there is an outcome.
        """
        load = self._loads.get(digest)
        if load is None or (load.done() and load.exception() is not None):
            thread = self._threads(1)  # a new one: one that has stepped back may not come forward again
            load = self._loads[digest] = thread.submit(self._load, folder, tuple(tasks), digest)
            thread.shutdown(wait=False)
            self._in_front = True
        load.add_done_callback(lambda _: give(notice))
        return load

    def step_back(self) -> None:
        """To be called at the beginning of a step: threads that load leave the processor to it from now on.

        Until then they share it as equals, for a vLLM that waits is busy too, and would take nine tenths of a core.
        """
        if not self._in_front:
            return
        self._in_front = False
        for thread in threading.enumerate():
            if thread.name.startswith(_THREADS) and thread.native_id:
                step_back(thread.native_id)

    def state(self, digest: str) -> dict[str, Any] | None:
        """None while it is being read, `{}` once it is there, else the error in plain values (`raise_error`).

        Errors travel as values because an exception in a worker's remote call leaves the other workers' answers
        unread in vLLM, and the next call then receives them.
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

    def get(self, digest: str) -> T:
        """Raises KeyError unless the checkpoint is there."""
        load = self._loads[digest]
        if not load.done() or load.exception() is not None:
            raise KeyError(digest)
        return load.result()

    def drop(self, digest: str) -> None:
        """Forgets a checkpoint; one that is unknown is nothing. A thread gives its memory back."""
        load = self._loads.pop(digest, None)
        if load is None:
            return
        load.cancel()
        del load  # holds the checkpoint: what is freed only after memory was given back would stay
        self._freeing.submit(give_back)

    def _threads(self, count: int, settled: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
        """Threads with the priority of the one that gives them work, unless `settled` changes it."""

        def settle() -> None:
            if self._cores:
                os.sched_setaffinity(threading.get_native_id(), self._cores)
            _one_openmp_thread()
            settled()

        return ThreadPoolExecutor(count, thread_name_prefix=f"{_THREADS}-load", initializer=settle)

    def _load(self, folder: str, tasks: tuple[str, ...], digest: str) -> T:
        with self._one_at_a_time:
            return self._load_now(folder, tasks, digest)

    def _load_now(self, folder: str, tasks: tuple[str, ...], digest: str) -> T:
        # The engine's thread would keep Python's lock for 5 ms each time that loading asks for it, thousands of times.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._opened(folder, tasks) as checkpoint:
                found = checkpoint.manifest.adapter_digest
                if found != digest:
                    message = f"was changed while it was being loaded (adapter digest {found})"
                    remedy = "load it again once nothing writes to it"
                    raise CorruptCheckpoint(Problem(message, file=folder, remedy=remedy))
                with self._threads(len(self._cores) or os.cpu_count()) as pool:
                    return self._prepare(checkpoint, pool)
        finally:
            sys.setswitchinterval(interval)


def _one_openmp_thread() -> None:
    """For the calling thread alone: otherwise each loading thread gets a team, which spins beside the engine's own.

    vLLM has switched torch.set_num_threads off in its workers, so torch's OpenMP is asked itself.
    """
    symbol = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if symbol is None:
        try:
            symbol = ctypes.CDLL("libgomp.so.1").omp_set_num_threads  # the one that torch has loaded
        except (OSError, AttributeError):
            return  # another OpenMP, or none: loading is only less considerate
    symbol(1)


def raise_error(state: Mapping[str, Any]) -> None:
    """Raises the error that a state describes; nothing if it describes none.

    Raises:
        LorafError: of the kind that the worker raised.
        RuntimeError: the worker failed for a reason that is not the user's.
    """
    if "problems" not in state:
        return
    problems = [Problem(*fields) for fields in state["problems"]]
    if not state["kind"]:
        raise RuntimeError("; ".join(p.message for p in problems))
    raise _KINDS[state["kind"]](problems)
