"""Merges one task set at a time into the model's weights."""

from __future__ import annotations

import threading
import time

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger, OriginalWeights
from loraf.tasksets import TaskSet

# (adapter digest, task set): determines the answers. The base model has no digest.
SetKey = tuple[str | None, TaskSet]
BASE: SetKey = (None, TaskSet())


class MergedWeights:
    """Adapters by digest, and the task set that is merged now.

    Call `use` and `remove` in the thread that runs the model. `add` may run at the same time as `use`, but not as
    `remove`.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._originals = OriginalWeights(model)
        self._lock = threading.Lock()  # guards the next one
        self._mergers: dict[str, Merger] = {}  # by digest
        self._current: SetKey | None = BASE

    def add(self, digest: str, checkpoint: Checkpoint) -> None:
        """Prepares an adapter: rebuilds its A and copies the weights that it changes. Any thread; may take long.

        Raises:
            BaseMismatch, CorruptCheckpoint: as `loraf.delta.Merger`. Nothing has changed then.
        """
        if not self.knows(digest):
            merger = Merger(self._model, checkpoint, originals=self._originals)
            with self._lock:
                self._mergers[digest] = merger

    def knows(self, digest: str) -> bool:
        """Whether an adapter has been added."""
        return digest in self._mergers

    def resident_bytes(self, digest: str) -> int:
        """Bytes of an adapter's A; 0 if it is unknown. Copies of original weights are shared and not counted."""
        merger = self._mergers.get(digest)
        return 0 if merger is None else merger.resident_bytes

    def remove(self, digest: str) -> None:
        """Frees an adapter's A, and copies of original weights that only it needs. No-op if it is unknown."""
        if not self.knows(digest):
            return
        with self._lock:
            del self._mergers[digest]
            needed = {name for merger in self._mergers.values() for name in merger.checkpoint.manifest.modules}
        if self._current is not None and self._current[0] == digest:
            self._current = None  # only some modules get their original weights back below
        self._originals.release(except_for=needed)

    def use(self, key: SetKey) -> float:
        """Merges a set into the original weights. No-op if it is merged already. Returns the seconds it took.

        If it raises, the weights are undefined until a later call succeeds.
        """
        if key == self._current:
            return 0.0
        began = time.monotonic()
        self._current = None
        digest, task_set = key
        if digest is None:
            self._originals.restore()
        else:
            with self._lock:
                merger = self._mergers[digest]
            merger.merge(task_set)
        self._current = key
        return time.monotonic() - began


def key_of(digest: str | None, task_set: TaskSet) -> SetKey:
    """The key of a set. The empty set of every adapter is the base model."""
    return BASE if task_set.is_base else (digest, task_set)
