"""The project's A with a dense B that all tasks share: what masks add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraf.delta import OriginalWeights, task_scale
from loraf.matrices import projection
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.trainable_base import TrainableBase, find_targets
from loraf_train.compare.methods.base import (
    Bench,
    Listener,
    Method,
    TrainedTask,
    adapter_settings,
    on_step,
    seed_of,
    written_bytes,
)
from loraf_train.processes import group
from loraf_train.sequence.train_task import train_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.settings.config import RunConfig, TaskConfig


class FrozenA(Method):
    """The project's seeded A with one dense B: each task continues training the B of the task before.

    At the start of a task with another α, B is rescaled so that α/r · B stays the same. When a task ends, B is rounded
    to `adapter.dtype`, as loraf's values are.
    """

    name = "frozen-a"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model, rank = bench.model, config.adapter.rank
        targets = find_targets(model, config.adapter.target_modules, str(config.file))
        a = {name: _a(config, name, linear).to(linear.weight.dtype) for name, linear in targets.items()}
        base = TrainableBase(model, targets, a, bench.pad_id)
        all_positions = {name: torch.arange(linear.out_features * rank) for name, linear in targets.items()}
        earlier = dict.fromkeys(targets, EarlierTasks.of(()))
        scaled: dict[str, torch.Tensor] = {}  # module → α/r · B of the last task, (d_out · rank,)
        for task in config.tasks:
            scale = task_scale(task.alpha, rank)
            listener.started(task)
            values, outcome = train_task(
                base,
                task,
                bench.data[task.name].train,
                all_positions,
                earlier,
                seed_of(config, task),
                getattr(torch, config.adapter.dtype),
                on_step(listener, task),
                partial(listener.ended, task),
                start={name: b / scale for name, b in scaled.items()},
            )
            dense = {name: b.values.view(b.shape) for name, b in values.items()}  # all positions, in order
            size = written_bytes(bench, partial(_save_tensors, dense))
            scaled = {name: b.float().view(-1) * scale for name, b in dense.items()}
            if group.is_first():
                with _merged(model, config, targets, scaled):
                    trainable = sum(map(len, all_positions.values()))
                    listener.trained(task, TrainedTask(trainable, outcome.steps, size))
            group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return adapter_settings(config, task, without=("calibration", "sparsity", "start"))


def _a(config: RunConfig, module: str, linear: torch.nn.Linear) -> torch.Tensor:
    """A of a module, (rank, d_in) float32, on the device of its weight."""
    adapter = config.adapter
    a, _ = projection.projection_and_digest(config.seed, module, adapter.rank, linear.in_features, adapter.init_std)
    return a.to(linear.weight.device)


@contextmanager
def _merged(
    model: PreTrainedModel,
    config: RunConfig,
    targets: Mapping[str, torch.nn.Linear],
    scaled: Mapping[str, torch.Tensor],
) -> Iterator[None]:
    """A context in which the weights include ΔW. `scaled`: module → α/r · B, (d_out · rank,)."""
    originals = OriginalWeights(model)
    for name, linear in targets.items():
        originals.keep(name, linear)
        b = scaled[name].view(linear.out_features, -1).to(linear.weight.device)
        originals.add(name, b @ _a(config, name, linear))
    yield
    originals.restore()


def _save_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(dict(tensors), folder / "b.safetensors")
