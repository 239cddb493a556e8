"""Bytes of a model and of adapters, from headers and manifests alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from loraf.base_files import tensors_in
from loraf.base_model import weight_files
from loraf.errors import ConfigError, Problem, one_line
from loraf.limits import index_bytes
from loraf.manifest import Manifest

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # loaded in the engine's dtype; others stay as they are
_OTHER_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8, "I16": 16, "I32": 32, "U32": 32, "I64": 64}
_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of the compiled kernel, see csrc/layer.h.
_BLOCK, _WINDOW = 16, 256
_PADDING = 1.1  # rows of a slice are padded to the longest of 16


@dataclass(frozen=True)
class ModelSize:
    """A model's tensors, as its files state them.

    Attributes:
        architecture: named by config.json.
        floats: number of values that are loaded in the engine's dtype.
        other_bytes: of quantised and other weights, which keep theirs.
        linear: (d_out, d_in) of the weight matrices in its layers.
    """

    architecture: str
    floats: int
    other_bytes: int
    linear: tuple[tuple[int, int], ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the loaded weights."""
        return self.floats * dtype.itemsize + self.other_bytes


def model_size(folder: Path) -> ModelSize:
    """Reads the headers of a model's weights.

    Raises:
        ConfigError: config.json or a file of the weights cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {name: spec for file in weight_files(folder) for name, spec in tensors_in(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        remedy = "download or copy the model again"
        raise ConfigError(Problem(f"cannot be read ({one_line(error)})", file=str(folder), remedy=remedy)) from None
    if config.get("tie_word_embeddings") and len(tensors) > 1:
        tensors.pop("lm_head.weight", None)  # the same values as the embedding
    linear = [
        (shape[0], shape[1])
        for name, (_, shape) in tensors.items()
        if len(shape) == 2 and name.endswith(".weight") and any(part.isdecimal() for part in name.split("."))
    ]
    floats = sum(math.prod(shape) for dtype, shape in tensors.values() if dtype in _FLOATS)
    other = sum(
        math.prod(shape) * _OTHER_BITS.get(dtype, 8) // 8 for dtype, shape in tensors.values() if dtype not in _FLOATS
    )
    return ModelSize(", ".join(config.get("architectures") or ["?"]), floats, other, tuple(linear))


def values_bytes(manifest: Manifest) -> int:
    """Bytes of the coordinates and values of all tasks, as they are stored and as they are read."""
    return sum(
        task.k.get(name, 0) * (index_bytes(module.d_out) + index_bytes(manifest.rank) + _VALUE_BYTES[task.dtype])
        for task in manifest.tasks
        for name, module in manifest.modules.items()
    )


def a_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """Bytes of A of all modules."""
    return sum(manifest.rank * module.d_in for module in manifest.modules.values()) * dtype.itemsize


def b_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """Bytes of a dense B of all modules, which is what one built task set takes beside A."""
    return sum(manifest.rank * module.d_out for module in manifest.modules.values()) * dtype.itemsize


def packed_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """Bytes of A and all tasks, packed for the compiled kernel on a CPU. An estimate: padding depends on the masks."""
    rank = _rounded_up(manifest.rank, _BLOCK)
    entry_index = 1 if manifest.rank <= 256 else 2
    total = 0.0
    for name, module in manifest.modules.items():
        windows = -(-module.d_out // _WINDOW)
        total += rank * module.d_in * dtype.itemsize + 4 * (windows * len(manifest.tasks) + 1)
        rows = _rounded_up(module.d_out, _BLOCK)
        for task in manifest.tasks:
            value = 2 if task.dtype == "bfloat16" else 4
            total += rows + rows // 8 + _PADDING * task.k.get(name, 0) * (value + entry_index)
    return int(total)


def on_gpu_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """Bytes of A, one dense B for all tasks, and the owner of each position, for the GPU kernel."""
    rank, planes = _rounded_up(manifest.rank, _BLOCK), -(-len(manifest.tasks) // 16)
    return sum(
        rank * (module.d_in * dtype.itemsize + module.d_out * (dtype.itemsize + 2 * planes))
        for module in manifest.modules.values()
    )


def changed_weights_bytes(manifests: list[Manifest], dtype: torch.dtype) -> int:
    """Bytes of the copies of all weights that some adapter changes."""
    modules = {name: module for manifest in manifests for name, module in manifest.modules.items()}
    return sum(module.d_out * module.d_in for module in modules.values()) * dtype.itemsize


def slots_bytes(model: ModelSize, slots: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of vLLM's LoRA slots: A and B of every linear layer, at the largest rank."""
    return slots * rank * sum(d_out + d_in for d_out, d_in in model.linear) * dtype.itemsize


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
