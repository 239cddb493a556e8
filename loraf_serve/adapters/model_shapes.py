"""Compares a checkpoint's modules with the weights on disk, before anything is computed from the shapes it states.

The backends compare them with their own layers too, but some only once values have been read.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from loraf.base_model import weight_files
from loraf.errors import ConfigError, Problem
from loraf.files.bounded_file import open_regular
from loraf.manifest import Manifest

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # others are packed: their shape is not the layer's
_MOST_PACKED = 16  # values in one stored number
_REMEDY = "use the base model of the checkpoint"


def misfits(manifest: Manifest, model_folder: Path, where: str) -> list[Problem]:
    """Returns every module that has another shape in the model, or that is larger than anything in it.

    A module that the files have under another name is not compared any further, but all modules together must not be
    larger than the model: A of each is computed, which would take hours for what a manifest of some kilobytes can
    state. Empty if the files cannot be read.

    Args:
        where: the checkpoint's folder, for messages.
    """
    weights = _weights(Path(model_folder))
    if not weights:
        return []
    largest = max(math.prod(shape) for _, shape in weights.values()) * _MOST_PACKED
    problems = []
    for module, spec in manifest.modules.items():
        dtype, shape = weights.get(f"{module}.weight", ("", ()))
        stated = (spec.d_out, spec.d_in)
        if dtype in _FLOATS and len(shape) == 2 and shape != stated:
            message = f"has shape {shape} in the model, {stated} in the checkpoint"
        elif spec.d_out * spec.d_in > largest:
            message = f"has shape {stated} in the checkpoint, which is larger than anything in the model"
        else:
            continue
        problems.append(Problem(message, module, where, _REMEDY))
    all_sides = sum(spec.d_out + spec.d_in for spec in manifest.modules.values())
    if not problems and all_sides > sum(_sides(shape) for _, shape in weights.values()) * _MOST_PACKED:
        problems.append(Problem("are together larger than the model", "modules", where, _REMEDY))
    return problems


def _sides(shape: tuple[int, ...]) -> int:
    """Returns the sum of the sides of a matrix, or of all matrices in a tensor (of experts, say)."""
    return math.prod(shape[:-2]) * sum(shape[-2:])


@lru_cache(maxsize=8)
def _weights(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name → dtype and shape of the tensors of a model; empty if they cannot be read."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        for file in weight_files(folder):
            with open_regular(file) as stream:
                length = int.from_bytes(stream.read(8), "little")
                header: dict[str, Any] = json.loads(stream.read(min(length, _LONGEST_HEADER)))
            header.pop("__metadata__", None)
            found |= {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (ConfigError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # `describe` and the backend report a damaged model
    return found
