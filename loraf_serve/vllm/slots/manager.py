"""The slots backend's LoRA manager, which builds the LoRA of a task set from a checkpoint in memory.

LoRARequest(path "loraf:<digest>:<set>") ─▶ SlotsLoRAManager._load_adapter ─▶ LoRAModel (A, B of the set) ─▶ a slot
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b
from loraf.errors import CheckpointError, Problem
from loraf.tasksets import TaskSet
from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.worker import targets
from loraf_serve.vllm.worker.manager import CheckpointLoRAManager


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        projections: module → A, (rank, d_in) in the engine's LoRA dtype.
        nbytes: of A and B.
    """

    checkpoint: Checkpoint
    projections: Mapping[str, torch.Tensor]

    def tensors(self, task_set: TaskSet) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yields (module, A, B) with ΔW = B·A: A (rank, d_in), the same for all sets, and B (d_out, rank), scaled."""
        for module, a in self.projections.items():
            yield module, a, combined_b(self.checkpoint, module, task_set).to(a.dtype)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.projections.values()) + self.checkpoint.nbytes


class SlotsLoRAManager(CheckpointLoRAManager[Checkpoint, LoadedCheckpoint]):
    """Also loads task sets of the checkpoints in memory, as dense adapters."""

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Runs within an engine step, where an exception ends the engine. So everything that can be wrong with a
        checkpoint is checked when it is loaded."""
        digest_and_set = parse_lora_path(lora_request.lora_path)
        if digest_and_set is None:
            return super()._load_adapter(lora_request)
        digest, text = digest_and_set
        loaded = self.store.get(digest)
        manifest = loaded.checkpoint.manifest
        rank = manifest.rank
        layers = {}
        for module, a, b in loaded.tensors(TaskSet.parse(text, manifest.task_names)):
            name = targets.vllm_name(self._adapter_manager.model, module)
            layers[name] = LoRALayerWeights(name, rank, lora_alpha=rank, lora_a=a, lora_b=b, scaling=1.0)
        return LoRAModel(lora_request.lora_int_id, rank, layers)

    def _open(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[Checkpoint]:
        return nullcontext(Checkpoint.open(folder, tasks))

    def _prepare(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> LoadedCheckpoint:
        """Builds A of every module.

        Raises:
            CheckpointError: the rank exceeds the engine's.
            BaseMismatch, NotProven: lists every module that vLLM would not apply, or not as transformers does.
        """
        manifest = checkpoint.manifest
        where = str(checkpoint.path)
        if manifest.rank > self.lora_config.max_lora_rank:
            message = f"rank {manifest.rank} is beyond the engine's largest, {self.lora_config.max_lora_rank}"
            raise CheckpointError(Problem(message, "rank", where, "start the server with a larger --max-lora-rank"))
        self.require_layers(manifest, where)
        modules, dtype = list(manifest.modules), self.dtype
        projections = pool.map(lambda module: checkpoint.projection_of(module, dtype), modules)
        return LoadedCheckpoint(checkpoint, dict(zip(modules, projections, strict=True)))
