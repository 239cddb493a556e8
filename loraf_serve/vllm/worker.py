"""Inside vLLM's worker: the adapter of a task set is built from a resident checkpoint, without a file.

LoRARequest(path "loraf:<digest>:<set>") ─▶ SlotsLoRAManager._load_adapter ─▶ LoRAModel (A, B of the set) ─▶ a slot
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, Problem
from loraf.tasksets import TaskSet
from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.store import CheckpointStore


class SlotsModelManager(LRUCacheLoRAModelManager):
    """Puts LoRA layers on linear layers only.

    vLLM would put them on embeddings and the output head as well, where they cost memory (vocabulary × rank for each
    slot) and time in every step, for base rows too.
    """

    def _create_lora_modules(self) -> None:
        embeddings = self.model.embedding_modules
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in embeddings]
        super()._create_lora_modules()


class SlotsLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's own manager, which also knows the adapters of resident LoRAF checkpoints."""

    _manager_cls = SlotsModelManager

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self.store = CheckpointStore(self.lora_config.lora_dtype, self._require_applicable)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Runs in the middle of an engine step, where an exception ends the engine: so nothing here can be at fault
        that was not checked when the checkpoint became resident."""
        named = parse_lora_path(lora_request.lora_path)
        if named is None:
            return super()._load_adapter(lora_request)
        digest, text = named
        resident = self.store.get(digest)
        manifest = resident.checkpoint.manifest
        rank = manifest.rank
        layers = {}
        for module, a, b in resident.tensors(TaskSet.parse(text, manifest.task_names)):
            name = self._vllm_name(module)
            layers[name] = LoRALayerWeights(name, rank, lora_alpha=rank, lora_a=a, lora_b=b, scaling=1.0)
        return LoRAModel(lora_request.lora_int_id, rank, layers)

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every linear layer that LoRA is applied to, by the adapter's name of it (vLLM's fused
        layers count as the layers they hold), over all tensor-parallel workers."""
        manager: LoRAModelManager = self._adapter_manager
        shapes = {}
        for name, layer in manager.modules.items():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                parts = manager.packed_modules.get(name, [name])
                for part, d_out in zip(parts, _output_sizes(layer.base_layer, len(parts)), strict=False):
                    shapes[part] = (d_out, layer.base_layer.input_size)
        return shapes

    def _vllm_name(self, module: str) -> str:
        """vLLM's name of a module, as its loader of PEFT adapters finds it."""
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]

    def _require_applicable(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError or BaseMismatch: all reasons why the engine cannot apply a checkpoint."""
        manifest = checkpoint.manifest
        where = str(checkpoint.path)
        if manifest.rank > self.lora_config.max_lora_rank:
            message = f"rank {manifest.rank} is beyond the engine's largest, {self.lora_config.max_lora_rank}"
            raise CheckpointError(Problem(message, "rank", where, "start the server with a larger --max-lora-rank"))
        shapes = self.layer_shapes()
        problems = []
        for module, spec in manifest.modules.items():
            shape = shapes.get(self._vllm_name(module))
            if shape is None:
                remedy = "serve it with --backend merged"
                problems.append(Problem("vLLM applies no LoRA to this layer", module, where, remedy))
            elif shape != (spec.d_out, spec.d_in):
                message = f"has shape {shape} in the model, {(spec.d_out, spec.d_in)} in the checkpoint"
                problems.append(Problem(message, module, where, "use the base model of the checkpoint"))
        if problems:
            raise BaseMismatch(problems)


def _output_sizes(layer: LinearBase, parts: int) -> list[int]:
    """d_out of each of the `parts` layers that a linear layer holds, over all tensor-parallel workers.

    Empty if vLLM splits the layer in another way than the adapter's names do.
    """
    if isinstance(layer, QKVParallelLinear):
        # `output_sizes` counts a key/value head once for each worker that holds a copy of it.
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    if parts == 1:
        return [sum(sizes)]
    return sizes if len(sizes) == parts else []
