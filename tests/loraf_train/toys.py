"""Toy tasks for the trainer's tests: repeat a short sequence with a number added to each token, one per task."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loraf.checkpoint import Checkpoint
from loraf.manifest import Templates
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.trainable_base import TrainableBase, find_targets, projections, shapes_of
from loraf_train.data.examples import Example
from loraf_train.data.task_data import TaskData
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.data import DataConfig, RecordSource
from loraf_train.settings.parts import AdapterConfig, CalibrationConfig, TrainingConfig
from loraf_train.trainer import batches, loop
from tests import standins

PAD = 0

# accelerate collects garbage at the start of every training; this spares it the objects of the imports above.
gc.freeze()


def examples(move: int, count: int = 24) -> list[Example]:
    """Sequences of various lengths within the toy models' vocabulary of 320."""
    chance = random.Random(move)
    drawn = []
    for _ in range(count):
        question = [chance.randrange(10, 200) for _ in range(chance.randrange(2, 6))]
        prompt = [1, *question, 3]
        drawn.append(Example([*prompt, *(token + move for token in question), 2], len(prompt)))
    return drawn


def data(move: int, count: int = 24) -> TaskData:
    templates = Templates(prompt=f"{{question}}+{move}\n", completion="{answer}")
    return TaskData(
        train=examples(move, count), evaluation={}, templates=templates, records=count, metric="exact_match"
    )


def task(
    name: str, *, alpha: float = 16.0, sparsity: float = 0.75, start: str = "previous", **parts: Any
) -> TaskConfig:
    """A task of few steps at a high rate. `parts`: mappings calibration=…, training=…, data=… of other settings."""
    training = {"learning_rate": 2e-2, "batch_size": 8, "max_steps": 4, "dropout": 0.0, **parts.pop("training", {})}
    calibration = {"steps": 2, "learning_rate": 1e-2, **parts.pop("calibration", {})}
    source = {"train": (RecordSource(file=Path(f"/data/{name}.jsonl")),), **parts.pop("data", {})}
    return TaskConfig(
        name=name,
        alpha=alpha,
        sparsity=sparsity,
        start=start,
        calibration=CalibrationConfig(**calibration).resolved(TrainingConfig(**training)),
        training=TrainingConfig(**training),
        data=DataConfig(**source),
        **parts,
    )


def run_config(
    model: Path, output: Path, *tasks: TaskConfig, adapter: dict[str, Any] | None = None, **run
) -> RunConfig:
    shape = AdapterConfig(
        **{"rank": 8, "sparsity": 0.75, "target_modules": ("q_proj", "v_proj", "down_proj")} | (adapter or {})
    )
    run = {"retention": None} | run  # Algorithm 1
    return RunConfig(model=str(model), output=output, tasks=tasks, adapter=shape, file=Path("/data/tasks.yaml"), **run)


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def trainable_base(
    model_folder: Path, checkpoint_folder: Path, rank: int = 8, dtype: torch.dtype = torch.float64, **values
) -> tuple[TrainableBase, Checkpoint]:
    """A model with its targets, and a checkpoint for it with random tasks: `values` are name=(alpha, sparsity)."""
    model = load(model_folder, dtype)
    targets = find_targets(model, ("q_proj", "v_proj", "down_proj"))
    shapes = shapes_of(targets)
    checkpoint = Checkpoint.create(
        checkpoint_folder, standins.describe(str(model_folder), model_folder), rank, shapes, 0
    )
    sparsities = {sparsity for _, sparsity in values.values()} or {0.75}
    drawn = standins.random_values(shapes, rank, list(values), sparsities.pop(), seed=5)
    for name, (alpha, sparsity) in values.items():
        checkpoint.add_task(name, drawn[name], alpha=alpha, sparsity=sparsity)
    return TrainableBase(model, targets, projections(checkpoint, targets), PAD), checkpoint


def taken(checkpoint: Checkpoint) -> dict[str, list[SparseB]]:
    return {module: [b[module] for b in checkpoint.tasks.values()] for module in checkpoint.manifest.modules}


def phase(*, seed: int, optimizer: str = "adamw", **settings: Any) -> loop.Phase:
    """A phase with these training settings; unlike a tasks.yaml it may switch clipping off (max_grad_norm=0)."""
    unchecked = {key: settings.pop(key) for key in ("max_grad_norm",) if key in settings}
    return loop.Phase("toy", seed, TrainingConfig(**settings).model_copy(update=unchecked), optimizer)


def batch(chosen: list[Example]) -> dict[str, torch.Tensor]:
    return batches.Collator(PAD)(chosen)


class DenseLoraf(torch.nn.Module):
    """Reference for LorafLinear: W·x + b + s·B·A·x with a dense B, differentiated by autograd."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, scale: float, earlier: torch.Tensor):
        super().__init__()
        self.base, self.a, self.scale, self.earlier = base, a, scale, earlier
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, a.shape[0], dtype=base.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight + (self.scale * self.b + self.earlier) @ self.a
        return torch.nn.functional.linear(x, weight, self.base.bias)
