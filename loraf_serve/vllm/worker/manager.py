"""The slots backend inside vLLM's worker: the adapter of a task set is built from a checkpoint in memory.

LoRARequest(path "loraf:<digest>:<set>") ─▶ SlotsLoRAManager._load_adapter ─▶ LoRAModel (A, B of the set) ─▶ a slot
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b
from loraf.described import Described
from loraf.errors import CheckpointError, Problem
from loraf.tasksets import TaskSet
from loraf_serve.vllm import targets
from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.store import CheckpointStore


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

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.projections.values()) + self.checkpoint.nbytes


class LinearOnlyModelManager(LRUCacheLoRAModelManager):
    """Puts LoRA layers on linear layers only.

    vLLM would put them on embeddings and the output head as well, where they cost memory (vocabulary × rank for each
    slot) and time in every step, for base rows too.
    """

    def _create_lora_modules(self) -> None:
        embeddings = self.model.embedding_modules
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in embeddings]
        super()._create_lora_modules()


class CheckpointLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's own manager with a store of checkpoints; a subclass says what is made of them.

    Args:
        cores: processors that loading may use.
    """

    _manager_cls = LinearOnlyModelManager

    def __init__(self, vllm_config: VllmConfig, *args, cores=(), **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self.store = CheckpointStore(self._opened, self._prepare, cores)

    def _opened(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[Described]:
        """See `CheckpointStore`."""
        raise NotImplementedError

    def _prepare(self, checkpoint: Described, pool: ThreadPoolExecutor) -> Any:
        """See `CheckpointStore`; what it makes has `nbytes`."""
        raise NotImplementedError

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """vLLM calls it at the beginning of every step."""
        self.store.step_back()
        super().set_active_adapters(requests, mapping)

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        return targets.layer_shapes(self._adapter_manager)

    def loaded(self, digest: str) -> int:
        """From now on the checkpoint may be named. Returns its bytes in this worker, slots not counted."""
        return self.store.get(digest).nbytes

    def drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint and what was made of its sets; no request of it may be running."""
        for lora_id in lora_ids:
            self.remove_adapter(lora_id)
        self.store.drop(digest)


class SlotsLoRAManager(CheckpointLoRAManager):
    """Also knows the adapters of checkpoints in memory: a set becomes a dense one."""

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Runs in the middle of an engine step, where an exception ends the engine: so nothing here can be at fault
        that was not checked when the checkpoint was loaded."""
        named = parse_lora_path(lora_request.lora_path)
        if named is None:
            return super()._load_adapter(lora_request)
        digest, text = named
        resident = self.store.get(digest)
        manifest = resident.checkpoint.manifest
        rank = manifest.rank
        layers = {}
        for module, a, b in resident.tensors(TaskSet.parse(text, manifest.task_names)):
            name = targets.vllm_name(self._adapter_manager.model, module)
            layers[name] = LoRALayerWeights(name, rank, lora_alpha=rank, lora_a=a, lora_b=b, scaling=1.0)
        return LoRAModel(lora_request.lora_int_id, rank, layers)

    def _opened(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[Checkpoint]:
        return nullcontext(Checkpoint.open(folder, tasks))

    def _prepare(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> Resident:
        """Raises CheckpointError or BaseMismatch: all reasons why the engine cannot apply a checkpoint."""
        manifest = checkpoint.manifest
        where = str(checkpoint.path)
        if manifest.rank > self.lora_config.max_lora_rank:
            message = f"rank {manifest.rank} is beyond the engine's largest, {self.lora_config.max_lora_rank}"
            raise CheckpointError(Problem(message, "rank", where, "start the server with a larger --max-lora-rank"))
        targets.require_layers(manifest, self.layer_shapes(), self._adapter_manager.model, where)
        modules = list(manifest.modules)
        dtype = self.lora_config.lora_dtype
        made = pool.map(lambda module: checkpoint.projection_of(module, dtype), modules)
        return Resident(checkpoint, dict(zip(modules, made, strict=True)))
