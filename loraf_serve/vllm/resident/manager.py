"""The resident backend's LoRA managers: a task set becomes weights, a checkpoint becomes operands."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from vllm.config import VllmConfig
from vllm.lora import model_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import Problem
from loraf.manifest import Manifest
from loraf.matrices.sparse import SparseB
from loraf.tasksets import TaskSet
from loraf_serve import kernels
from loraf_serve.backends.backend import SelfCheckFailed
from loraf_serve.kernels import Operand
from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.resident import selfcheck
from loraf_serve.vllm.resident.layers import ResidentLayer, from_layer
from loraf_serve.vllm.resident.weights import StepWeights, TaskWeights
from loraf_serve.vllm.worker import parts, targets
from loraf_serve.vllm.worker.manager import CheckpointLoRAManager, LinearOnlyModelManager
from loraf_serve.vllm.worker.proof import Proof

if TYPE_CHECKING:
    from vllm.lora.punica_wrapper import PunicaWrapperBase

    from loraf_serve.kernels.triton_kernel import TritonOperand
    from loraf_serve.vllm.resident.gpu import Gpu


class TaskWeightsAdapter(LoRAModel):
    """A task set in the form of vLLM's adapters, without A and B.

    Attributes:
        task_weights: None for the adapters of vLLM's warm-up.
    """

    task_weights: TaskWeights | None = None


class ResidentModelManager(LinearOnlyModelManager):
    """Keeps nothing in slots: task weights are looked up by the adapter's id.

    Attributes:
        step: the weights of the current step.
        gpu: memory of the GPU kernel; None on a CPU.
    """

    step: StepWeights
    gpu: Gpu | None

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        self.supports_mm = False
        self.step = StepWeights(self._weights_of)
        wrapper = cast("PunicaWrapperBase", self.step)
        self.punica_wrapper_mapping = {model_manager.DEFAULT_LANGUAGE_WRAPPER_KEY: wrapper}

    def _create_lora_modules(self) -> None:
        with _resident_layers():
            super()._create_lora_modules()
        layers = self.layers()
        self.gpu = self._new_gpu(layers) if torch.device(self.device).type == "cuda" else None
        self.step.gpu = self.gpu
        for name, layer in layers.items():
            layer.register(name)
            layer.gpu = self.gpu

    def layers(self) -> dict[str, ResidentLayer]:
        """Returns the linear layers, by vLLM's names."""
        return {name: layer for name, layer in targets.linear_layers(self).items() if isinstance(layer, ResidentLayer)}

    def _new_gpu(self, layers: Mapping[str, ResidentLayer]) -> Gpu:
        from loraf_serve.vllm.resident.gpu import Gpu  # needs Triton

        bands = {name: parts.bands(self, name, layer) for name, layer in layers.items()}
        rank = self.lora_config.max_lora_rank
        return Gpu(bands, rank, self.max_num_batched_tokens, torch.device(self.device))

    def _weights_of(self, lora_id: int) -> TaskWeights | None:
        adapter = self._registered_adapters[lora_id]
        return adapter.task_weights if isinstance(adapter, TaskWeightsAdapter) else None

    def create_dummy_lora(
        self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None
    ) -> TaskWeightsAdapter:
        return TaskWeightsAdapter(lora_id, 1, {})

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """Does nothing, because there are no A and B to merge."""

    def activate_adapter(self, lora_id: int) -> bool:
        """Assigns a slot, because vLLM counts them. Copies nothing."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        self.lora_index_to_id[self.lora_index_to_id.index(None)] = lora_id
        self._active_adapters[lora_id] = None
        return True


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A loaded checkpoint: the operand of each of vLLM's layers that it acts on."""

    manifest: Manifest
    operands: Mapping[str, Operand]

    @property
    def nbytes(self) -> int:
        return sum(operand.nbytes for operand in self.operands.values())


class ResidentLoRAManager(CheckpointLoRAManager[CheckpointStream, PreparedCheckpoint]):
    """Turns the task set of vLLM's LoRA request into task weights."""

    _manager_cls = ResidentModelManager

    @property
    def _resident_models(self) -> ResidentModelManager:
        manager = self._adapter_manager
        assert isinstance(manager, ResidentModelManager)
        return manager

    def _load_adapter(self, lora_request: LoRARequest) -> TaskWeightsAdapter:
        """Runs within an engine step, where an exception ends the engine. So everything that can be wrong with a
        checkpoint is checked when it is loaded."""
        digest_and_set = parse_lora_path(lora_request.lora_path)
        if digest_and_set is None:
            raise RuntimeError(f"{lora_request.lora_path} is not a task set of a loaded checkpoint")
        digest, text = digest_and_set
        manifest = self.store.get(digest).manifest
        adapter = TaskWeightsAdapter(lora_request.lora_int_id, 1, {})
        adapter.task_weights = TaskWeights.of(digest, manifest, TaskSet.parse(text, manifest.task_names))
        return adapter

    def proven(self, proof: Proof) -> None:
        for name, layer in self._resident_models.layers().items():
            layer.in_use = proof.is_any_proven(name)

    def activate(self, digest: str) -> int:
        """Puts the operands into the layers, where the next step finds them."""
        operands, models = self.store.get(digest).operands, self._resident_models
        if models.gpu is not None:
            models.gpu.put(digest, cast("Mapping[str, TritonOperand]", operands))
        else:
            layers = models.layers()
            for name, operand in operands.items():
                layers[name].operands[digest] = operand
        return super().activate(digest)

    def drop(self, digest: str, lora_ids: list[int]) -> None:
        models = self._resident_models
        for layer in models.layers().values():
            layer.operands.pop(digest, None)
        models.step.active = []
        models._last_mapping = None  # makes vLLM update the weights before the next step
        if models.gpu is not None:
            models.gpu.remove(digest)
        super().drop(digest, lora_ids)

    def _open(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[CheckpointStream]:
        return CheckpointStream.open(folder, tasks)

    def _prepare(self, checkpoint: CheckpointStream, pool: ThreadPoolExecutor) -> PreparedCheckpoint:
        """Runs in the loading thread.

        Raises:
            CorruptCheckpoint: lists everything that is wrong with the checkpoint.
            BaseMismatch, NotProven: lists every reason why the engine cannot apply it, or not as transformers does.
            SelfCheckFailed: lists every layer whose delta differs from that of ΔW.
        """
        manifest, where = checkpoint.manifest, str(checkpoint.path)
        manager = self._resident_models
        layers, gpu, dtype = manager.layers(), manager.gpu, self.dtype
        if gpu is not None:
            gpu.require(manifest, where)
        self.require_layers(manifest, where)
        modules = {targets.vllm_name(manager.model, module): module for module in manifest.modules}

        def prepare_layer(name: str) -> tuple[Operand, str | None] | None:
            """Returns the layer's operand and the self-check's finding, or None if the checkpoint has no part in it."""
            layer = layers[name]
            layer_parts = parts.layer_parts(manager, name, layer, modules)
            if not layer_parts:
                return None
            projections = {part.module: checkpoint.projection_of(part.module, dtype) for part in layer_parts}
            stream = gpu.loading() if gpu is not None else contextlib.nullcontext()
            with checkpoint.read_modules(list(projections)) as tasks, stream:
                kernel_parts = [_kernel_part(part, projections[part.module], tasks) for part in layer_parts]
                operand: Operand = kernels.prepare(kernel_parts) if gpu is None else gpu.operand(name, kernel_parts)
                size, seed = sum(layer.output_slices), zlib.crc32(name.encode())
                return operand, selfcheck.difference(operand, layer_parts, projections, tasks, size, seed)

        # In the model's order, which is the manifest's, as `CheckpointStream` requires.
        results = zip(layers, pool.map(prepare_layer, layers), strict=True)
        prepared = {name: result for name, result in results if result is not None}
        checkpoint.finish()
        problems = [Problem(difference, name, where) for name, (_, difference) in prepared.items() if difference]
        if problems:
            raise SelfCheckFailed(problems)
        return PreparedCheckpoint(manifest, {name: operand for name, (operand, _) in prepared.items()})


def _kernel_part(part: parts.LayerPart, a: torch.Tensor, tasks: Mapping[str, Mapping[str, SparseB]]) -> kernels.Part:
    """Args: the whole A of the part's module; task → module → B."""
    b_of_tasks = [modules[part.module] for modules in tasks.values()]
    return kernels.Part(a[:, slice(*part.columns)].contiguous(), b_of_tasks, *part.rows, part.offset)


@contextlib.contextmanager
def _resident_layers() -> Iterator[None]:
    """Within the context vLLM's manager creates resident layers."""
    names = vars(model_manager)  # it imports `from_layer` and looks it up here
    stock, names["from_layer"] = names["from_layer"], from_layer
    try:
        yield
    finally:
        names["from_layer"] = stock
