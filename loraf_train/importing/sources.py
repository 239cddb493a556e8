"""Adapters from elsewhere, as `loraf-train import` sees them: a PEFT LoRA directory, or another LoRAF checkpoint.

Each tells of every module its ΔW as factors and, where its A is the checkpoint's own, the positions and values of its B
there, which can be taken over as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from loraf import base_model, manifest
from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b, task_scale
from loraf.errors import BaseMismatch, ConfigError, LorafError, Problem
from loraf.manifest import Manifest, Templates
from loraf.peft_import import CONFIG, Factors, read_peft
from loraf_train import task_sets


@dataclass(frozen=True)
class Own:
    """B on the checkpoint's own A: positions, ascending, (n,) int64; their values, (n,) float64."""

    flat: torch.Tensor
    values: torch.Tensor


class Foreign(Protocol):
    """What is imported.

    Attributes:
        described: in a few words.
        shapes: module → (d_out, d_in).
        sparsity, dtype: those that it has itself; None: it has none.
        training: what is known of its making.
        origin: for the manifest: which bytes it was.
    """

    described: str
    shapes: dict[str, tuple[int, int]]
    sparsity: float | None
    dtype: str | None
    training: dict[str, Any]
    templates: Templates
    origin: dict[str, Any]

    def alpha(self, rank: int) -> float:
        """Of the task that it becomes in a checkpoint of this rank; so chosen that its B need not be scaled."""

    def factors(self, module: str) -> Factors: ...

    def own(self, module: str, checkpoint: Checkpoint, scale: float) -> Own | None:
        """Its B on the checkpoint's A, to be multiplied by `scale`; None: its A is another one."""

    def base_problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why it is no adapter of the checkpoint's base model."""

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        """Tasks of the checkpoint on top of which it was trained."""

    def remarks(self, into: Manifest) -> Iterator[str]:
        """What the user ought to know."""


def open_foreign(folder: Path, tasks: str | None) -> Foreign:
    """What is in `folder`, read and verified.

    Args:
        tasks: which tasks of a LoRAF checkpoint, as one set.

    Raises:
        LorafError: it is neither kind, it is damaged or says what a task cannot do, or there is no such set.
    """
    if (folder / manifest.FILE_NAME).exists():
        return LorafSource(folder, tasks)
    if not (folder / CONFIG).exists():
        message = f"holds neither {manifest.FILE_NAME} nor {CONFIG}"
        raise ConfigError(Problem(message, "DIR", str(folder), "name a LoRAF checkpoint or a PEFT LoRA directory"))
    problems = []
    if tasks is not None:
        problems.append(Problem("a PEFT directory has no tasks to choose from", "--tasks", str(folder), "leave it out"))
    try:
        source = PeftSource(folder)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return source


class PeftSource:
    """A PEFT LoRA directory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lora = read_peft(folder)
        self.described = f"a PEFT LoRA of rank {self._lora.rank}"
        self.shapes = {name: factors.shape for name, factors in self._lora.modules.items()}
        self.sparsity = self.dtype = None
        self.training: dict[str, Any] = {}
        self.templates = Templates()
        file = self._lora.file
        self.origin = {
            "from": "peft",
            "source": folder.absolute().name,
            "base_model": self._lora.base_model,
            "file": {"path": file.path, "bytes": file.bytes, "sha256": file.sha256},
        }

    def alpha(self, rank: int) -> float:
        scales = Counter(factors.scale for factors in self._lora.modules.values() if factors.scale)
        return rank * scales.most_common(1)[0][0]

    def factors(self, module: str) -> Factors:
        return self._lora.modules[module]

    def own(self, module: str, checkpoint: Checkpoint, scale: float) -> Own | None:
        factors = self._lora.modules[module]
        a = checkpoint.projection_of(module).to(factors.a.dtype)  # an A in bfloat16 is A rounded
        if not torch.equal(a, factors.a):
            return None
        b = factors.b.reshape(-1).double()
        flat = b.nonzero().view(-1)
        return Own(flat, _times(b[flat], factors.scale / scale))

    def base_problems(self, checkpoint: Checkpoint) -> list[Problem]:
        expected, name = checkpoint.manifest.base_model, self._lora.base_model
        if name is None or base_model.SHORT_NAMES.get(name, name) == expected.name:
            return []
        file = str(self._folder / CONFIG)
        if (Path(name) / "config.json").is_file():
            try:
                base_model.require_same_base(expected, Path(name), checkpoint.path)
            except (BaseMismatch, ConfigError) as error:
                return list(error.problems)
            return []
        message = f"is {name}, the checkpoint is for {expected.name}, and their weights cannot be compared here"
        remedy = "say --allow-other-base if they are the same model"
        return [Problem(message, "base_model_name_or_path", file, remedy)]

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        return ()

    def remarks(self, into: Manifest) -> Iterator[str]:
        expected = into.base_model
        if self._lora.base_model is None:
            yield f"{self._folder / CONFIG} does not say for which base model the adapter is"
        elif self._lora.revision and expected.revision and self._lora.revision != expected.revision:
            yield f"the adapter is for revision {self._lora.revision} of the base, the checkpoint {expected.revision}"


class LorafSource:
    """A task set of another LoRAF checkpoint."""

    def __init__(self, folder: Path, tasks: str | None):
        there = manifest.read(folder)
        if tasks is None and len(there.tasks) != 1:
            message = f"the checkpoint holds {', '.join(there.task_names) or 'no tasks'}"
            raise ConfigError(Problem(message, "--tasks", str(folder), "name those that are to become the task"))
        self._set = task_sets.task_set(tasks or "all", there)
        if self._set.is_base:
            raise ConfigError(Problem(f"{tasks!r} is no task", "--tasks", str(folder), "name one or more"))
        self._there = there
        self._checkpoint = Checkpoint.open(folder, self._set.names)
        self._scales = [
            (name, task_scale(there.task(name).alpha, there.rank, weight)) for name, weight in self._set.weights
        ]
        if not all(scale for _, scale in self._scales):
            raise ConfigError(Problem("a chosen task has alpha 0", "alpha", str(folder), "leave it out"))
        chosen = [there.task(name) for name in self._set.names]
        only = chosen[0] if len(chosen) == 1 else None
        self.described = f"{self._set} of a LoRAF checkpoint"
        self.shapes = {name: (module.d_out, module.d_in) for name, module in there.modules.items()}
        self.sparsity = only.sparsity if only else None
        self.dtype = chosen[0].dtype if len({task.dtype for task in chosen}) == 1 else None
        self.training = dict(only.training) if only else {}
        self.templates = only.templates if only else Templates()
        self.origin = {
            "from": "loraf",
            "source": folder.absolute().name,
            "base_model": there.base_model.name,
            "set": str(self._set),
            "adapter_digest": there.adapter_digest,
            "files": {task.name: task.file.sha256 for task in chosen},
        }

    def alpha(self, rank: int) -> float:
        name, weight = self._set.weights[0]
        return weight * self._there.task(name).alpha * (rank / self._there.rank)

    def factors(self, module: str) -> Factors:
        b = combined_b(self._checkpoint, module, self._set)
        return Factors(self._checkpoint.projection_of(module), b, 1.0)

    def own(self, module: str, checkpoint: Checkpoint, scale: float) -> Own | None:
        here, there = checkpoint.manifest, self._there
        digests = (m.modules[module].projection_sha256 for m in (here, there))
        if here.rank != there.rank or len(set(digests)) > 1:
            return None
        masks = [(self._checkpoint.tasks[name][module], factor / scale) for name, factor in self._scales]
        flat = torch.cat([b.flat for b, _ in masks])
        order = flat.argsort()
        return Own(flat[order], torch.cat([_times(b.values.double(), factor) for b, factor in masks])[order])

    def base_problems(self, checkpoint: Checkpoint) -> list[Problem]:
        found = self._there.base_model
        try:
            base_model.require_same_base(checkpoint.manifest.base_model, Path(found.name), checkpoint.path, found)
        except BaseMismatch as mismatch:
            return list(mismatch.problems)
        return []

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        below = self._below()
        if below and all(_same_task(name, self._there, into) for name in below):
            return tuple(name for name in into.task_names if name in below)
        return ()

    def remarks(self, into: Manifest) -> Iterator[str]:
        below = self._below()
        if below and not self.trained_with(into):
            whole = ",".join([*below, *self._set.names])
            known = all(name in self._there.task_names for name in below)
            yield (
                f"{self._set} was trained on top of {', '.join(below)}, which this checkpoint does not have as it was "
                "then: alone it is not what it was trained as"
                + (f"; --tasks {whole} makes one task of all that acted" if known else "")
            )

    def _below(self) -> list[str]:
        """Tasks that acted, beside the chosen ones, when the last of these was trained."""
        try:
            acted = self._there.as_trained(self._set.names[-1]).names
        except LorafError:  # one of them has been taken out
            acted = (*self._there.task(self._set.names[-1]).trained_with, self._set.names[-1])
        return [name for name in acted if name not in self._set.names]


def _times(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """values · ratio; a ratio that is 1 but for the rounding of two quotients leaves them as they are."""
    return values if math.isclose(ratio, 1.0, rel_tol=1e-12) else values * ratio


def _same_task(name: str, there: Manifest, here: Manifest) -> bool:
    """Whether both checkpoints have the very same task under this name, on the same A."""
    if name not in there.task_names or name not in here.task_names:
        return False
    one, other = there.task(name), here.task(name)
    same_a = there.rank == here.rank and there.projection.sha256 == here.projection.sha256
    return same_a and (one.file.sha256, one.alpha) == (other.file.sha256, other.alpha)
