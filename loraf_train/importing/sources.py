"""Foreign adapters for `loraf-train import`: a PEFT LoRA directory, or another LoRAF checkpoint.

Each source gives every module's ΔW as factors. Where its A equals the checkpoint's, it also gives the positions and
values of its B, which can be copied unchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from loraf import base_model, manifest, set_text
from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b, task_scale
from loraf.errors import BaseMismatch, ConfigError, LorafError, Problem
from loraf.manifest import Manifest, Templates
from loraf.peft_import import CONFIG, Factors, Shapes, read_peft


@dataclass(frozen=True)
class ExactB:
    """B of a foreign adapter in a module where its A equals the checkpoint's, so that it can be copied.

    Attributes:
        positions: (n,) int64, ascending.
        values: (n,) float64.
    """

    positions: torch.Tensor
    values: torch.Tensor


class ForeignAdapter(Protocol):
    """An adapter to import.

    Attributes:
        description: in a few words.
        shapes: module → (d_out, d_in).
        misfits: why these cannot be imported, see `open_foreign`; then it has no values.
        sparsity, dtype: its own; None: it has none.
        training: its provenance as far as it is known, for the manifest.
        origin: what identifies its bytes, for the manifest.
    """

    description: str
    shapes: dict[str, tuple[int, int]]
    misfits: list[Problem]
    sparsity: float | None
    dtype: str | None
    training: dict[str, Any]
    templates: Templates
    origin: dict[str, Any]

    def alpha(self, rank: int) -> float:
        """Returns α for the task in a checkpoint of this rank, such that most of its B need not be scaled."""

    def factors(self, module: str) -> Factors: ...

    def exact_b(self, module: str, checkpoint: Checkpoint, scale: float) -> ExactB | None:
        """Returns its B divided by `scale`, the task's α/r; None: its A is not the checkpoint's."""

    def base_problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """Reasons why it is not an adapter of the checkpoint's base model."""

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        """Returns the tasks of the checkpoint on top of which it was trained."""

    def remarks(self, into: Manifest) -> Iterator[str]:
        """Yields remarks for the user."""


def open_foreign(
    folder: Path, tasks: str | None, misfits: Callable[[Shapes], list[Problem]] = lambda shapes: []
) -> ForeignAdapter:
    """Reads and verifies the adapter in `folder`.

    Args:
        tasks: the task set of a LoRAF checkpoint to import as one task; None: its only task.
        misfits: returns why modules of these shapes cannot be imported. If it returns anything, no value is read.

    Raises:
        LorafError: the folder is of neither kind, is damaged or has features that a task cannot have, or there is no
            such task set.
    """
    if (folder / manifest.FILE_NAME).exists():
        return LorafSource(folder, tasks, misfits)
    if not (folder / CONFIG).exists():
        message = f"holds neither {manifest.FILE_NAME} nor {CONFIG}"
        raise ConfigError(Problem(message, "DIR", str(folder), "name a LoRAF checkpoint or a PEFT LoRA directory"))
    problems = []
    if tasks is not None:
        problems.append(Problem("a PEFT directory has no tasks to choose from", "--tasks", str(folder), "leave it out"))
    try:
        source = PeftSource(folder, misfits)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return source


class PeftSource:
    """A PEFT LoRA directory."""

    def __init__(self, folder: Path, misfits: Callable[[Shapes], list[Problem]]):
        self._folder = folder
        self._lora = read_peft(folder, misfits)
        self.description = f"a PEFT LoRA of rank {self._lora.rank}"
        self.shapes = self._lora.shapes
        self.misfits = self._lora.misfits
        self.sparsity: float | None = None
        self.dtype: str | None = None
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

    def exact_b(self, module: str, checkpoint: Checkpoint, scale: float) -> ExactB | None:
        factors = self._lora.modules[module]
        a = checkpoint.projection_of(module).to(factors.a.dtype)  # an A stored in bfloat16 is A rounded
        if not torch.equal(a, factors.a):
            return None
        b = factors.b.reshape(-1).double()
        positions = b.nonzero().view(-1)
        return ExactB(positions, _times(b[positions], factors.scale / scale))

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
        message = f"is {name}, but the checkpoint is for {expected.name}, and their weights cannot be compared here"
        remedy = "add --allow-other-base if they are the same model"
        return [Problem(message, "base_model_name_or_path", file, remedy)]

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        return ()

    def remarks(self, into: Manifest) -> Iterator[str]:
        expected = into.base_model
        if self._lora.base_model is None:
            yield f"{self._folder / CONFIG} does not name the adapter's base model"
        elif self._lora.revision and expected.revision and self._lora.revision != expected.revision:
            message = f"the adapter is for revision {self._lora.revision} of the base model"
            yield f"{message}, but the checkpoint is for {expected.revision}"


class LorafSource:
    """A task set of another LoRAF checkpoint."""

    def __init__(self, folder: Path, tasks: str | None, misfits: Callable[[Shapes], list[Problem]]):
        source = manifest.read(folder)
        if tasks is None and len(source.tasks) != 1:
            message = f"the checkpoint holds {', '.join(source.task_names) or 'no tasks'}"
            raise ConfigError(Problem(message, "--tasks", str(folder), "name the tasks to import as one task"))
        self._set = set_text.task_set(tasks or "all", source)
        if self._set.is_base:
            raise ConfigError(Problem(f"{tasks!r} is not a task", "--tasks", str(folder), "name one or more tasks"))
        self.shapes = {name: (module.d_out, module.d_in) for name, module in source.modules.items()}
        self.misfits = misfits(self.shapes)
        self._manifest = source
        if not self.misfits:
            self._checkpoint = Checkpoint.open(folder, self._set.names)
        self._scales = [
            (name, task_scale(source.task(name).alpha, source.rank, weight)) for name, weight in self._set.weights
        ]
        without_effect = [name for name, scale in self._scales if not scale]
        if without_effect:
            message = f"{', '.join(without_effect)} has alpha 0, and so no effect"
            raise ConfigError(Problem(message, "--tasks", str(folder), "leave it out"))
        imported = [source.task(name) for name in self._set.names]
        only = imported[0] if len(imported) == 1 else None
        self.description = f"{self._set} of a LoRAF checkpoint"
        self.sparsity = only.sparsity if only else None
        self.dtype = imported[0].dtype if len({task.dtype for task in imported}) == 1 else None
        self.training = dict(only.training) if only else {}
        self.templates = only.templates if only else Templates()
        self.origin = {
            "from": "loraf",
            "source": folder.absolute().name,
            "base_model": source.base_model.name,
            "set": str(self._set),
            "adapter_digest": source.adapter_digest,
            "files": {task.name: task.file.sha256 for task in imported},
        }

    def alpha(self, rank: int) -> float:
        name, weight = self._set.weights[0]
        return weight * self._manifest.task(name).alpha * (rank / self._manifest.rank)

    def factors(self, module: str) -> Factors:
        b = combined_b(self._checkpoint, module, self._set)
        return Factors(self._checkpoint.projection_of(module), b, 1.0)

    def exact_b(self, module: str, checkpoint: Checkpoint, scale: float) -> ExactB | None:
        target, source = checkpoint.manifest, self._manifest
        digests = (m.modules[module].projection_sha256 for m in (target, source))
        if target.rank != source.rank or len(set(digests)) > 1:
            return None
        scaled = [(self._checkpoint.tasks[name][module], factor / scale) for name, factor in self._scales]
        positions = torch.cat([b.positions for b, _ in scaled])
        values = torch.cat([_times(b.values.double(), factor) for b, factor in scaled])
        order = positions.argsort()
        return ExactB(positions[order], values[order])

    def base_problems(self, checkpoint: Checkpoint) -> list[Problem]:
        base = self._manifest.base_model
        try:
            base_model.require_same_base(checkpoint.manifest.base_model, Path(base.name), checkpoint.path, base)
        except BaseMismatch as mismatch:
            return list(mismatch.problems)
        return []

    def trained_with(self, into: Manifest) -> tuple[str, ...]:
        earlier = self._trained_on()
        if earlier and all(_same_task(name, self._manifest, into) for name in earlier):
            return tuple(name for name in into.task_names if name in earlier)
        return ()

    def remarks(self, into: Manifest) -> Iterator[str]:
        earlier = self._trained_on()
        if earlier and not self.trained_with(into):
            all_tasks = ",".join([*earlier, *self._set.names])
            known = all(name in self._manifest.task_names for name in earlier)
            yield (
                f"{self._set} was trained on top of {', '.join(earlier)}, which this checkpoint does not have "
                "unchanged: imported alone, it behaves differently from when it was trained"
                + (f"; --tasks {all_tasks} imports all of them as one task" if known else "")
            )

    def _trained_on(self) -> list[str]:
        """Tasks outside the set that were active when the last task of the set was trained."""
        last = self._set.names[-1]
        try:
            active = self._manifest.as_trained(last).names
        except LorafError:  # one of them has been removed
            active = (*self._manifest.task(last).trained_with, last)
        return [name for name in active if name not in self._set.names]


def _times(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Returns values · ratio; a ratio that differs from 1 only by rounding leaves them unchanged."""
    return values if math.isclose(ratio, 1.0, rel_tol=1e-12) else values * ratio


def _same_task(name: str, source: Manifest, target: Manifest) -> bool:
    """Whether both checkpoints have the same task under this name, with the same A."""
    if name not in source.task_names or name not in target.task_names:
        return False
    imported, existing = source.task(name), target.task(name)
    same_a = source.rank == target.rank and source.projection.sha256 == target.projection.sha256
    return same_a and (imported.file.sha256, imported.alpha) == (existing.file.sha256, existing.alpha)
