"""Checkpoints that a vLLM worker keeps in memory, from which it builds the adapter of any task set.

A checkpoint is read once, in a thread beside the engine's loop, and verified against the digest that the service
verified. Afterwards no file of it is opened again: a set is A (kept, in the engine's dtype) and the chosen tasks' B,
put together in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from loraf import errors
from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b
from loraf.errors import CorruptCheckpoint, LorafError, Problem
from loraf.tasksets import TaskSet


@dataclass(frozen=True)
class Resident:
    """A checkpoint in memory.

    Attributes:
        projections: module → A, (rank, d_in) in the engine's LoRA dtype.
    """

    checkpoint: Checkpoint
    projections: Mapping[str, torch.Tensor]

    def tensors(self, task_set: TaskSet) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(module, A, B) with ΔW = B·A: A (rank, d_in) is shared by all sets, B (d_out, rank) holds their scales."""
        for module, a in self.projections.items():
            yield module, a, combined_b(self.checkpoint, module, task_set).to(a.dtype)


class CheckpointStore:
    """The resident checkpoints of one worker, by adapter digest.

    Args:
        dtype: of A and B in the engine.
        accept: called with a checkpoint that has been read; raises LorafError if the engine cannot apply it.
    """

    def __init__(self, dtype: torch.dtype, accept: Callable[[Checkpoint], None]):
        self._dtype = dtype
        self._accept = accept
        self._loads: dict[str, Future[Resident]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraf-load")

    def begin(self, folder: str, tasks: Sequence[str], digest: str) -> None:
        """Starts to read a checkpoint, unless it is resident or being read. `state` tells the outcome."""
        load = self._loads.get(digest)
        if load is None or (load.done() and load.exception() is not None):
            self._loads[digest] = self._thread.submit(self._load, folder, tuple(tasks), digest)

    def state(self, digest: str) -> dict[str, Any] | None:
        """None while it is being read, `{}` once it is resident, else the error in plain values (`raise_error`).

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
            return {"kind": type(error).__name__, "problems": problems}
        return {"kind": "", "problems": [[f"{type(error).__name__}: {error}", "", "", ""]]}

    def get(self, digest: str) -> Resident:
        """Raises KeyError unless the checkpoint is resident."""
        load = self._loads[digest]
        if not load.done() or load.exception() is not None:
            raise KeyError(digest)
        return load.result()

    def _load(self, folder: str, tasks: tuple[str, ...], digest: str) -> Resident:
        checkpoint = Checkpoint.open(folder, tasks)
        if checkpoint.manifest.adapter_digest != digest:
            message = f"was changed after it was verified (adapter digest {checkpoint.manifest.adapter_digest})"
            remedy = "load it again once nothing writes to it"
            raise CorruptCheckpoint(Problem(message, file=folder, remedy=remedy))
        self._accept(checkpoint)
        modules = list(checkpoint.manifest.modules)
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda module: checkpoint.projection_of(module).to(self._dtype), modules)
            return Resident(checkpoint, dict(zip(modules, made, strict=True)))


def raise_error(state: Mapping[str, Any]) -> None:
    """Raises the error that `CheckpointStore.state` described; nothing for `{}`.

    Raises:
        LorafError: of the kind that the worker raised.
        RuntimeError: the worker failed for a reason that is not the user's.
    """
    if not state:
        return
    problems = [Problem(*fields) for fields in state["problems"]]
    if not state["kind"]:
        raise RuntimeError("; ".join(p.message for p in problems))
    raise getattr(errors, state["kind"])(problems)
