"""Small checkpoints without a model, and functions that damage them while keeping all digests valid."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.manifest import BaseModel, Manifest
from loraf.matrices.sparse import SparseB
from tests.standins import random_values

BASE = BaseModel("org/model", "LlamaForCausalLM", "f" * 64, None, {"hidden_size": 24})
SHAPES = {"model.layers.0.self_attn.q_proj": (300, 24), "model.layers.0.mlp.up_proj": (17, 24)}
Q, UP = SHAPES
RANK = 8
SPARSITY = 0.8
TASKS = ("math", "nlu", "code")


def values(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes) -> dict[str, dict[str, SparseB]]:
    """Returns task → module → SparseB for TASKS, with disjoint masks."""
    settings = {"shapes": SHAPES, "rank": RANK, "tasks": TASKS, "sparsity": SPARSITY} | changes
    return random_values(**settings, seed=seed, dtype=dtype)


def make(folder: Path, tasks=TASKS, **changes) -> Checkpoint:
    """Creates a checkpoint with `tasks` (the first of TASKS), each trained on top of the earlier ones."""
    checkpoint = Checkpoint.create(folder, BASE, RANK, SHAPES, seed=0)
    drawn = values(**changes)
    for i, name in enumerate(tasks):
        checkpoint.add_task(name, drawn[name], alpha=16.0 * (i + 1), sparsity=SPARSITY, trained_with=tasks[:i])
    return checkpoint


def task_file(folder: Path, task: str) -> Path:
    return folder / "tasks" / f"{task}.safetensors"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns path → content and modification time of every file, except temporary ones."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest, with valid digests."""
    (folder / manifests.FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")


def rewrite_bytes(folder: Path, task: str, data: bytes) -> None:
    """Replaces a task's file, and its size and SHA-256 in the manifest."""
    task_file(folder, task).write_bytes(data)
    manifest = manifests.read(folder)
    stored = dataclasses.replace(manifest.task(task).file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    tasks = tuple(dataclasses.replace(t, file=stored) if t.name == task else t for t in manifest.tasks)
    write_manifest(folder, dataclasses.replace(manifest, tasks=tasks))


def rewrite(folder: Path, task: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes a task's tensors, and updates all digests."""
    tensors = safetensors.torch.load(task_file(folder, task).read_bytes())
    change(tensors)
    rewrite_bytes(folder, task, safetensors.torch.save(tensors))
