"""Checkpoints that a vLLM worker keeps in memory, prepared for use, by adapter digest.

A checkpoint is read once, in threads beside the engine's loop, and verified against the digest that the service
verified; then it is prepared for the backend that serves it. Afterwards no file of it is opened again.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, CorruptCheckpoint, LorafError, Problem, UnknownTask
from loraf_serve.backends.base import SelfCheckFailed
from loraf_serve.memory import give_back

T = TypeVar("T")
_ERRORS = (LorafError, ConfigError, UnknownTask, CheckpointError, CorruptCheckpoint, BaseMismatch, SelfCheckFailed)
_KINDS = {kind.__name__: kind for kind in _ERRORS}
_SWITCH_SECONDS = 2e-4
_NICENESS = 10  # of a loading thread: where it shares a core with the engine, the engine goes first


class CheckpointStore(Generic[T]):
    """The prepared checkpoints of one worker.

    Args:
        prepare: makes of a checkpoint that has been read what the worker needs, in the loading thread; raises
            LorafError if the engine cannot apply it. The pool is for its own use: threads like the loading one.
        cores: processors that loading may use. vLLM binds its worker to some; a thread would inherit that.
    """

    def __init__(self, prepare: Callable[[Checkpoint, ThreadPoolExecutor], T], cores: Sequence[int] = ()):
        self._prepare = prepare
        self._loads: dict[str, Future[T]] = {}

        def settle() -> None:
            if cores:
                os.sched_setaffinity(threading.get_native_id(), cores)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            _one_openmp_thread()

        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraf-load", initializer=settle)
        self._pool = ThreadPoolExecutor(
            len(cores) or os.cpu_count(), thread_name_prefix="loraf-prepare", initializer=settle
        )

    def begin(self, folder: str, tasks: Sequence[str], digest: str) -> None:
        """Starts to read a checkpoint, unless it is there or being read. `state` tells the outcome."""
        load = self._loads.get(digest)
        if load is None or (load.done() and load.exception() is not None):
            self._loads[digest] = self._thread.submit(self._load, folder, tuple(tasks), digest)

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
        """Forgets a checkpoint; one that is unknown is nothing. The loading thread gives its memory back."""
        load = self._loads.pop(digest, None)
        if load is None:
            return
        load.cancel()
        del load  # holds the checkpoint: what is freed only after memory was given back would stay
        self._thread.submit(give_back)

    def _load(self, folder: str, tasks: tuple[str, ...], digest: str) -> T:
        # The engine's thread would keep Python's lock for 5 ms each time that loading asks for it, thousands of times.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            checkpoint = Checkpoint.open(folder, tasks)
            if checkpoint.manifest.adapter_digest != digest:
                message = f"was changed while it was being loaded (adapter digest {checkpoint.manifest.adapter_digest})"
                remedy = "load it again once nothing writes to it"
                raise CorruptCheckpoint(Problem(message, file=folder, remedy=remedy))
            return self._prepare(checkpoint, self._pool)
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
