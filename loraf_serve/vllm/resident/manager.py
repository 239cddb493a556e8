"""Requests become rows, checkpoints become operands: what stands in the place of vLLM's LoRA managers."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.lora import model_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from loraf.errors import Problem
from loraf.manifest import Manifest
from loraf.sparse import SparseB
from loraf.stream import Stream
from loraf.tasksets import TaskSet
from loraf_serve import kernels
from loraf_serve.backends.backend import SelfCheckFailed
from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.resident import parts, selfcheck
from loraf_serve.vllm.resident.layers import ResidentLayer, from_layer
from loraf_serve.vllm.resident.rows import Row, StepRows
from loraf_serve.vllm.worker import targets
from loraf_serve.vllm.worker.manager import CheckpointLoRAManager, LinearOnlyModelManager

if TYPE_CHECKING:
    from loraf_serve.vllm.resident.gpu import Gpu


class RowModel(LoRAModel):
    """What vLLM takes for an adapter: a row, and no weights. vLLM's warm-up makes copies of one without a row."""

    row: Row | None = None


class ResidentModelManager(LinearOnlyModelManager):
    """Slots hold nothing: a row is looked up by the adapter's id."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        self.supports_mm = False
        self.rows = StepRows(self._row_of)
        self.punica_wrapper_mapping = {model_manager.DEFAULT_LANGUAGE_WRAPPER_KEY: self.rows}

    def _create_lora_modules(self) -> None:
        with _layers_from(from_layer):
            super()._create_lora_modules()
        layers = targets.linear_layers(self)
        for name, layer in layers.items():
            layer.name_it(name)
        self.gpu = self._gpu(layers) if torch.device(self.device).type == "cuda" else None
        self.rows.gpu = self.gpu
        for layer in layers.values():
            layer.gpu = self.gpu

    def _gpu(self, layers: Mapping[str, ResidentLayer]) -> Gpu:
        from loraf_serve.vllm.resident.gpu import Gpu  # needs Triton

        bands = {name: parts.bands(self, name, layer) for name, layer in layers.items()}
        rank = self.lora_config.max_lora_rank
        return Gpu(bands, rank, self.max_num_batched_tokens, torch.device(self.device))

    def _row_of(self, lora_id: int) -> Row | None:
        return self._registered_adapters[lora_id].row

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules=None) -> RowModel:
        return RowModel(lora_id, 1, {})

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """A row has no weights to merge."""

    def activate_adapter(self, lora_id: int) -> bool:
        """Gives the row a slot, which vLLM counts; nothing is copied."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        self.lora_index_to_id[self.lora_index_to_id.index(None)] = lora_id
        self._active_adapters[lora_id] = None
        return True


@dataclass(frozen=True)
class Prepared:
    """A checkpoint ready to act: the operand of each of vLLM's layers that it acts on."""

    manifest: Manifest
    operands: Mapping[str, kernels.Operand]

    @property
    def nbytes(self) -> int:
        return sum(operand.nbytes for operand in self.operands.values())


class ResidentLoRAManager(CheckpointLoRAManager):
    """Answers vLLM's requests for adapters with rows."""

    _manager_cls = ResidentModelManager

    def _load_adapter(self, lora_request: LoRARequest) -> RowModel:
        """Runs in the middle of an engine step, where an exception ends the engine: so nothing here can be at fault
        that was not checked when the checkpoint was loaded."""
        named = parse_lora_path(lora_request.lora_path)
        if named is None:
            raise RuntimeError(f"{lora_request.lora_path} is no task set of a loaded checkpoint")
        digest, text = named
        manifest = self.store.get(digest).manifest
        model = RowModel(lora_request.lora_int_id, 1, {})
        model.row = Row.of(digest, manifest, TaskSet.parse(text, manifest.task_names))
        return model

    def loaded(self, digest: str) -> int:
        """Puts the operands into the layers, where the next step finds them."""
        operands = self.store.get(digest).operands
        if self._adapter_manager.gpu is not None:
            self._adapter_manager.gpu.put(digest, operands)
        else:
            layers = self._layers()
            for name, operand in operands.items():
                layers[name].operands[digest] = operand
        return super().loaded(digest)

    def drop(self, digest: str, lora_ids: list[int]) -> None:
        for layer in self._layers().values():
            layer.operands.pop(digest, None)
        self._adapter_manager.rows.active = []
        self._adapter_manager._last_mapping = None  # so that the next step's rows are made anew
        if self._adapter_manager.gpu is not None:
            self._adapter_manager.gpu.remove(digest)
        super().drop(digest, lora_ids)

    def _layers(self) -> dict[str, ResidentLayer]:
        return targets.linear_layers(self._adapter_manager)

    def _opened(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[Stream]:
        return Stream.open(folder, tasks)

    def _prepare(self, checkpoint: Stream, pool: ThreadPoolExecutor) -> Prepared:
        """In the loading thread.

        Raises:
            CorruptCheckpoint: all that is wrong with the checkpoint.
            BaseMismatch: all reasons why the engine cannot apply it.
            SelfCheckFailed: a layer's delta is not that of ΔW.
        """
        manifest, where = checkpoint.manifest, str(checkpoint.path)
        manager, layers = self._adapter_manager, self._layers()
        gpu = manager.gpu
        if gpu is not None:
            gpu.require(manifest, where)
        targets.require_layers(manifest, self.layer_shapes(), manager.model, where)
        modules = {targets.vllm_name(manager.model, module): module for module in manifest.modules}
        dtype = self.lora_config.lora_dtype

        def make(name: str) -> tuple[kernels.Operand, str | None] | None:
            layer = layers[name]
            pieces = parts.pieces(manager, name, layer, modules)
            if not pieces:
                return None
            projections = {piece.module: checkpoint.projection_of(piece.module, dtype) for piece in pieces}
            beside = gpu.loading() if gpu is not None else contextlib.nullcontext()
            with checkpoint.masks(list(projections)) as masks, beside:
                several = [_part(piece, projections[piece.module], masks) for piece in pieces]
                operand = kernels.prepare(several) if gpu is None else gpu.operand(name, several)
                size, seed = sum(layer.output_slices), zlib.crc32(name.encode())
                return operand, selfcheck.difference(operand, pieces, projections, masks, size, seed)

        # In the model's order, which is the manifest's: see `Stream`.
        each = zip(layers, pool.map(make, layers), strict=True)
        made = {name: found for name, found in each if found is not None}
        checkpoint.finish()
        wrong = [Problem(fault, name, where) for name, (_, fault) in made.items() if fault]
        if wrong:
            raise SelfCheckFailed(wrong)
        return Prepared(manifest, {name: operand for name, (operand, _) in made.items()})


def _part(piece: parts.Piece, a: torch.Tensor, masks: Mapping[str, Mapping[str, SparseB]]) -> kernels.Part:
    tasks = [modules[piece.module] for modules in masks.values()]
    return kernels.Part(a[:, slice(*piece.columns)].contiguous(), tasks, *piece.rows, piece.offset)


@contextlib.contextmanager
def _layers_from(make) -> Iterator[None]:
    """vLLM's manager makes its layers with `make` meanwhile."""
    stock, model_manager.from_layer = model_manager.from_layer, make
    try:
        yield
    finally:
        model_manager.from_layer = stock
