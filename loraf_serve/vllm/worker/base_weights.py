"""Reads rows of the weights in a model's files, by vLLM's names of the modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraf.base_model import resolve, weight_files
from loraf.errors import LorafError
from loraf_serve.vllm.worker import targets

_DTYPES = ("F64", "F32", "BF16", "F16")


class BaseWeights:
    """The matrices in a model's safetensors files.

    transformers gives them to the modules of the same names, as they are: none of its conversions while it loads
    changes a linear layer's weight and keeps its name (tests/loraf_serve/vllm/worker/test_base_weights.py).

    Args:
        model: vLLM's.
        folder: with the files, or the model's name on the hub.
        revision: on the hub.
    """

    def __init__(self, model: torch.nn.Module, folder: str, revision: str | None = None):
        self._files: list[Any] = []
        self._stored: dict[str, list[tuple[Any, str]]] = {}  # module → (open file, name of the tensor)
        self._unreadable: str | None = None
        try:
            path = Path(folder) if Path(folder).is_dir() else resolve(folder, revision)
            for file in weight_files(path):
                tensors: Any = safe_open(str(file), framework="pt")
                self._files.append(tensors)
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name.endswith(".weight"):
                        module = targets.vllm_name(model, name.removesuffix(".weight"))
                        self._stored.setdefault(module, []).append((tensors, name))
        except (LorafError, SafetensorError, OSError) as error:
            self._unreadable = f"the model's weights cannot be read ({error})"

    def __contains__(self, module: str) -> bool:
        return module in self._stored

    def problem(self, module: str, shape: tuple[int, int]) -> str | None:
        """Returns why a module's weight cannot be compared, or None if it can.

        Args:
            shape: (d_out, d_in) in vLLM, over all workers.
        """
        stored = self._stored.get(module, [])
        if not stored:
            return self._unreadable or "the model's files hold no weight of this name"
        if len(stored) > 1:
            return f"the model's files hold several weights for it: {', '.join(name for _, name in stored)}"
        ((tensors, name),) = stored
        view = tensors.get_slice(name)
        if view.get_dtype() not in _DTYPES:
            return f"its weight is stored as {view.get_dtype()}, which cannot be compared with vLLM's layer"
        if tuple(view.get_shape()) != shape:
            return f"its weight has shape {tuple(view.get_shape())} in the model's files, {shape} in vLLM"
        return None

    def rows(self, module: str, runs: Sequence[tuple[int, int]], columns: tuple[int, int]) -> torch.Tensor:
        """Reads runs of rows, (first, one past the last) each, of the weight of a module without a problem.

        Returns:
            (rows, columns).
        """
        ((tensors, name),) = self._stored[module]
        view = tensors.get_slice(name)
        return torch.cat([view[first:stop, columns[0] : columns[1]] for first, stop in runs])

    def close(self) -> None:
        self._files.clear()
        self._stored.clear()
