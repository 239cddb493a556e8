"""Which rows of a step's batch an adapter acts on, and how strongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from loraf_serve import kernels

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

    from loraf.manifest import Manifest
    from loraf.tasksets import TaskSet
    from loraf_serve.vllm.resident.gpu import Gpu


@dataclass(frozen=True)
class Row:
    """What a task set is here.

    Attributes:
        digest: of the adapter.
        weights: (tasks,) float32: w_t · α_t / r in the checkpoint's order; 0 for a task that is not in the set.
    """

    digest: str
    weights: np.ndarray

    @classmethod
    def of(cls, digest: str, manifest: Manifest, task_set: TaskSet) -> Row:
        chosen = dict(task_set.weights)
        scaled = [chosen.get(task.name, 0.0) * task.alpha / manifest.rank for task in manifest.tasks]
        return cls(digest, np.array(scaled, dtype=np.float32))


class StepRows:
    """Stands where vLLM's layers expect a punica wrapper. vLLM refreshes it before a step whose mapping is new.

    Args:
        row_of: the row of a LoRA id; None for vLLM's own warm-up ids.

    Attributes:
        active: for each adapter that acts in this step, its digest and its rows.
        tokens: rows of the batch that the mapping speaks of.
        gpu: is told of every step; None on a CPU.
    """

    def __init__(self, row_of: Callable[[int], Row | None]):
        self._row_of = row_of
        self.active: list[tuple[str, kernels.Rows]] = []
        self.tokens = 0
        self.gpu: Gpu | None = None

    def update_metadata(self, mapping: LoRAMapping, *_args, **_kwargs) -> None:
        """Args: vLLM's mapping: a LoRA id for each token of the batch, 0 for none. Slots mean nothing here."""
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        self.tokens = len(ids)
        found, which = np.unique(ids, return_inverse=True)
        rows = [self._row_of(lora_id) if lora_id > 0 else None for lora_id in found.tolist()]
        self.active = []
        for digest in dict.fromkeys(row.digest for row in rows if row is not None):
            acting = [row is not None and row.digest == digest and bool(row.weights.any()) for row in rows]
            if not any(acting):
                continue
            tasks = next(len(row.weights) for row in rows if row is not None and row.digest == digest)
            table = np.zeros((len(rows), tasks), dtype=np.float32)
            for i, row in enumerate(rows):
                if acting[i]:
                    table[i] = row.weights
            indices = np.flatnonzero(np.array(acting)[which]).astype(np.int32)
            weights = table[which[indices]]
            self.active.append((digest, kernels.Rows(torch.from_numpy(indices), torch.from_numpy(weights))))
        if self.gpu is not None:
            self.gpu.step(bool((found > 0).any()), self.active)
