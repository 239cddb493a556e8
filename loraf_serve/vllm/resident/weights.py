"""The task weights of each row of a step's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loraf.delta import task_scale
from loraf_serve import kernels

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

    from loraf.manifest import Manifest
    from loraf.tasksets import TaskSet
    from loraf_serve.vllm.resident.gpu import Gpu


@dataclass(frozen=True)
class TaskWeights:
    """A task set as the resident backend applies it: one weight for each task of an adapter.

    Attributes:
        digest: of the adapter.
        weights: (tasks,) float32, w_t · α_t / r in the checkpoint's order; 0 for a task that is not in the set.
    """

    digest: str
    weights: np.ndarray

    @classmethod
    def of(cls, digest: str, manifest: Manifest, task_set: TaskSet) -> TaskWeights:
        set_weights = dict(task_set.weights)
        scaled = [task_scale(task.alpha, manifest.rank, set_weights.get(task.name, 0.0)) for task in manifest.tasks]
        return cls(digest, np.array(scaled, dtype=np.float32))


class StepWeights:
    """Takes the place of the punica wrapper in vLLM's layers. vLLM updates it before a step with a new mapping.

    Args:
        weights_of: returns the weights of a LoRA id, or None for one of vLLM's warm-up.

    Attributes:
        active: digest and batch weights of each adapter that acts in this step.
        tokens: rows of the batch in the mapping.
        gpu: receives the weights of every step; None on a CPU.
    """

    def __init__(self, weights_of: Callable[[int], TaskWeights | None]):
        self._weights_of = weights_of
        self.active: list[tuple[str, kernels.BatchWeights]] = []
        self.tokens = 0
        self.gpu: Gpu | None = None

    def update_metadata(self, mapping: LoRAMapping, *_args: Any, **_kwargs: Any) -> None:
        """Args: vLLM's mapping, a LoRA id for each token of the batch, 0 for none. Its slots are not used."""
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        self.tokens = len(ids)
        distinct_ids, id_index = np.unique(ids, return_inverse=True)
        distinct = [self._weights_of(lora_id) if lora_id > 0 else None for lora_id in distinct_ids.tolist()]
        self.active = []
        for digest in dict.fromkeys(item.digest for item in distinct if item is not None):
            acting = [item is not None and item.digest == digest and bool(item.weights.any()) for item in distinct]
            if not any(acting):
                continue
            indices = np.flatnonzero(np.array(acting)[id_index]).astype(np.int32)
            of_adapter = [item.weights for item in distinct if item is not None and item.digest == digest]
            table = np.zeros((len(distinct), len(of_adapter[0])), dtype=np.float32)
            table[[item is not None and item.digest == digest for item in distinct]] = of_adapter
            batch = kernels.BatchWeights(torch.from_numpy(indices), torch.from_numpy(table[id_index[indices]]))
            self.active.append((digest, batch))
        if self.gpu is not None:
            self.gpu.set_step(bool((distinct_ids > 0).any()), self.active)
