"""Keeps values that are loaded into an adapter to the task that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loraf.errors import ConfigError, Problem
from loraf.matrices.sparse import SparseB
from loraf_train.peft.config import LorafConfig
from loraf_train.peft.layer import LorafLayer

_HERE = ".loraf_tasks."


def made_with(config: LorafConfig) -> torch.Tensor:
    """Returns what a task's values mean nothing without: alpha, seed and init_std, as the bits of (3,) int64.

    Bits of integers, for a cast of the model changes floating point alone.
    """
    numbers = [config.r if config.alpha is None else config.alpha, config.seed, config.init_std or 0]
    return torch.tensor(numbers, dtype=torch.float64).view(torch.int64)


def require_own_values(
    adapter: str,
    task_name: str,
    config: LorafConfig,
    is_finished: bool,
    layers: Mapping[str, LorafLayer],
    taken: Mapping[str, Sequence[SparseB]],
    stored: Mapping[str, torch.Tensor],
) -> None:
    """Checks values that are about to be loaded into an adapter.

    Args:
        task_name, config, is_finished: of the adapter's task.
        layers: of the model, by module.
        taken: module → B of the other tasks.
        stored: the values, by the names that the model gives them.

    Raises:
        ConfigError: their layers or shapes differ, they are another task's, or they would change a finished one.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored.items():
        module, inside, rest = key.partition(_HERE)
        if inside:
            found.setdefault(module.removeprefix("base_model.model."), {})[rest.rsplit(".", 1)[-1]] = tensor
    problems = []
    if found.keys() != layers.keys():
        remedy = "use the target_modules that the stored task was trained with"
        message = f"the values for adapter {adapter!r} are of other layers"
        problems.append(Problem(message, "target_modules", remedy=remedy))
    for name in [name for name in found if name in layers]:
        task = layers[name].task(adapter)
        if any(t.shape != getattr(task, k).shape for k, t in found[name].items() if k in ("positions", "values")):
            remedy = "use the r and sparsity that the stored task was trained with"
            message = f"the values for adapter {adapter!r} have other shapes in {name}"
            problems.append(Problem(message, "r, sparsity", remedy=remedy))
            break
    problems += _other_settings(adapter, config, found)
    if problems:
        raise ConfigError(problems)
    for name, tensors in found.items():
        task, positions = layers[name].task(adapter), tensors.get("positions")
        if positions is None:
            continue
        positions = positions.cpu()
        if task.is_calibrated and not torch.equal(positions, task.positions.cpu()):
            message = f"what is loaded into it are the values of another task than {task_name!r}"
            remedy = "load each task into its own adapter: one of several has its folder inside the checkpoint's"
            raise ConfigError(Problem(message, f"adapter {adapter!r}", remedy=remedy))
        values = tensors.get("values")
        is_fixed = task.is_calibrated and is_finished
        if (
            is_fixed
            and values is not None
            and not torch.equal(values.cpu().float(), task.values.detach().cpu().float())
        ):
            message = f"task {task_name!r} is finished, and other values would replace its own"
            remedy = "load the finished tasks that these values were stored with"
            raise ConfigError(Problem(message, f"adapter {adapter!r}", remedy=remedy))
        if not task.is_calibrated and any(bool(torch.isin(positions, b.positions).any()) for b in taken[name]):
            message = f"task {task_name!r} has positions that another task of the model owns"
            remedy = "load it beside the tasks that it was trained with"
            raise ConfigError(Problem(message, f"adapter {adapter!r}", remedy=remedy))


def _other_settings(
    adapter: str, config: LorafConfig, found: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[Problem]:
    """What the stored values were trained with, and the adapter has otherwise. Values may come without that."""
    stored = next((tensors["made_with"] for tensors in found.values() if "made_with" in tensors), None)
    if stored is None:
        return []
    own = made_with(config)
    if stored.shape != own.shape or stored.dtype != own.dtype:
        message = f"the values for adapter {adapter!r} do not say what they were trained with"
        return [Problem(message, "made_with", remedy="load values that `save_pretrained` wrote")]
    problems = []
    theirs, ours = (bits.cpu().contiguous().view(torch.float64).tolist() for bits in (stored, own))
    for field, before, now in zip(("alpha", "seed", "init_std"), theirs, ours, strict=True):
        if before != now:
            text = "None" if field == "init_std" and not before else f"{before:.17g}"
            message = f"the values for adapter {adapter!r} were trained with {text}"
            problems.append(Problem(message, field, remedy=f"use {text}, or start anew"))
    return problems
