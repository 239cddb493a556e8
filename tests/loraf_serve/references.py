"""Slow, obvious references: the answers of a base model with ΔW(S) added."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.tasksets import TaskSet


class Merged:
    """Weights merged by loraf in transformers."""

    def __init__(self, model_folder: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        self._model = load(model_folder, dtype)
        self._merger = Merger(self._model, checkpoint)
        self._order = checkpoint.manifest.task_names

    def _merge(self, text: str) -> None:
        self._merger.merge(TaskSet.parse(text, self._order))

    def logits(self, text: str, token_ids: Sequence[int]) -> torch.Tensor:
        """(len(token_ids), vocabulary): row i predicts token i + 1."""
        self._merge(text)
        return forward(self._model, token_ids)

    def greedy(self, text: str, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy decoding of `count` tokens, without a KV cache."""
        self._merge(text)
        token_ids = list(prompt)
        for _ in range(count):
            token_ids.append(int(forward(self._model, token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]


class Formula:
    """ΔW(S) = Σ w·(α/r)·B·A written out, added to the weights, all in float64."""

    def __init__(self, model_folder: Path, checkpoint: Checkpoint):
        self._base, self._checkpoint = load(model_folder, torch.float64), checkpoint

    @torch.no_grad()
    def logits(self, text: str, token_ids: Sequence[int]) -> torch.Tensor:
        model = copy.deepcopy(self._base)
        manifest = self._checkpoint.manifest
        for module in manifest.modules:
            a = self._checkpoint.projection_of(module).double()
            for task, weight in TaskSet.parse(text, manifest.task_names).weights:
                sparse = self._checkpoint.tasks[task][module]
                b = torch.zeros(sparse.shape, dtype=torch.float64)
                for row, column, value in zip(sparse.rows.tolist(), sparse.cols.tolist(), sparse.values, strict=True):
                    b[row, column] = value.double()
                model.get_submodule(module).weight += weight * manifest.task(task).alpha / manifest.rank * (b @ a)
        return forward(model, token_ids)


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def forward(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """(len(token_ids), vocabulary). In one thread, which is faster for a small model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return model(torch.tensor([list(token_ids)])).logits[0]
    finally:
        torch.set_num_threads(threads)
