"""Which task set is in the model's weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger, OriginalWeights
from loraf.tasksets import TaskSet

# (adapter digest, task set): what an answer depends on. The base model has no digest.
SetKey = tuple[str | None, TaskSet]
BASE: SetKey = (None, TaskSet())


class MergedWeights:
    """Adapters by digest, and the set that is merged now. `use` belongs to the thread that runs the model."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._originals = OriginalWeights()
        self._lock = threading.Lock()  # over the next two
        self._mergers: dict[str, Merger] = {}  # by digest
        self._named: dict[str, str] = {}  # adapter's name → digest
        self._current: SetKey | None = BASE

    def add(self, name: str, digest: str, checkpoint: Checkpoint) -> None:
        """Makes an adapter ready: rebuilds its A, copies the weights that it changes. May take long; any thread.

        Raises:
            BaseMismatch, CorruptCheckpoint: as loraf.delta.Merger. Nothing has changed then.
        """
        merger = self._mergers.get(digest) or Merger(self._model, checkpoint, originals=self._originals)
        with self._lock:
            self._mergers[digest] = merger
            self._named[name] = digest

    def knows(self, digest: str) -> bool:
        return digest in self._mergers

    def forget_replaced(self, needed: Collection[str | None]) -> None:
        """Frees what is kept of adapters that have no name any more and are not `needed` (digests).

        That is A and the checkpoint; the copies of original weights stay.
        """
        with self._lock:
            keep = {*self._named.values(), *needed}
            self._mergers = {digest: merger for digest, merger in self._mergers.items() if digest in keep}

    def use(self, key: SetKey) -> float:
        """Puts a set into the weights, from the originals. Returns the seconds it took.

        If it raises, the weights are in no known state until a later call succeeds.
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
    """The base set of every adapter is the base model."""
    return BASE if task_set.is_base else (digest, task_set)
