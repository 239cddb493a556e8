"""The manifest `loraf.json`: what a checkpoint holds, in plain JSON. Standard library only, so that reading is fast.

Two digests: `Manifest.digest` covers the whole manifest (a flipped bit anywhere is seen); `Manifest.adapter_digest`
covers what changes answers (projection, alphas, task files), never scores or dates, and names content in caches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from loraf.errors import CheckpointError, CorruptCheckpoint, Problem, UnknownTask
from loraf.tasksets import TaskSet, name_problem

FILE_NAME = "loraf.json"
FORMAT = "loraf"
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")


def positions(sparsity: float, d_out: int, rank: int) -> int:
    """K = ⌊(1 − s)·d_out·r⌋, the number of positions a task owns in one B, exact (decimal, not binary, arithmetic)."""
    return int((1 - Decimal(str(sparsity))) * d_out * rank)


@dataclass(frozen=True)
class BaseModel:
    """The model a checkpoint was trained for.

    Attributes:
        shapes: the numbers of its config that fix tensor shapes (hidden_size, num_hidden_layers, …).
        fingerprint: digest of sampled weights, see `loraf.base.fingerprint`.
    """

    name: str
    architecture: str
    fingerprint: str
    revision: str | None = None
    shapes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """How A is made. `init_std` None: 1/√(3·d_in) of each module. `sha256`: `projection.combined_digest`."""

    generator: str
    seed: int
    sha256: str
    init_std: float | None = None


@dataclass(frozen=True)
class Module:
    """A target module: shape of its weight (d_out, d_in) and the digest of its A (rank, d_in)."""

    d_out: int
    d_in: int
    projection_sha256: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the checkpoint, path relative to its folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Templates:
    """How records became text: `str.format` templates over a record's fields."""

    prompt: str = "{prompt}"
    completion: str = "{completion}"


@dataclass(frozen=True)
class Task:
    """A finished task.

    Attributes:
        alpha: ΔW of this task is scaled by alpha / rank.
        k: module → number of positions it owns there.
        trained_with: tasks that were active below it while it was trained, in order.
        training: settings it was trained with, as written to the checkpoint.
        scores: list of {"set", "evaluation", "metric", "score", "count"} measured after training.
    """

    name: str
    alpha: float
    sparsity: float
    dtype: str
    file: StoredFile
    k: dict[str, int]
    trained_with: tuple[str, ...] = ()
    templates: Templates = Templates()
    training: dict[str, Any] = field(default_factory=dict)
    scores: tuple[dict[str, Any], ...] = ()

    @property
    def parameters(self) -> int:
        return sum(self.k.values())


@dataclass(frozen=True)
class Manifest:
    """Everything in `loraf.json`; tasks in the order they were trained."""

    base_model: BaseModel
    rank: int
    projection: Projection
    modules: dict[str, Module]
    tasks: tuple[Task, ...] = ()

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        """Raises UnknownTask."""
        for task in self.tasks:
            if task.name == name:
                return task
        have = ", ".join(self.task_names) or "none"
        raise UnknownTask(Problem(f"there is no task {name!r}", "tasks", remedy=f"choose from: {have}"))

    def as_trained(self, name: str) -> TaskSet:
        """The set that was active when `name` had just been trained: `trained_with` and itself.

        Raises:
            UnknownTask: `name`, or a task it was trained on top of, is not in this checkpoint (or not chosen).
        """
        names = (*self.task(name).trained_with, name)
        return TaskSet.of({n: 1.0 for n in names}, self.task_names)

    def all_tasks(self) -> TaskSet:
        return TaskSet.of({n: 1.0 for n in self.task_names}, self.task_names)

    def only(self, names: tuple[str, ...]) -> Manifest:
        """The same checkpoint as if it had only these tasks. Raises UnknownTask."""
        for name in names:
            self.task(name)
        return dataclasses.replace(self, tasks=tuple(t for t in self.tasks if t.name in names))

    def free_positions(self, module: str) -> int:
        """Positions of one B that no task owns."""
        return self.modules[module].d_out * self.rank - sum(task.k.get(module, 0) for task in self.tasks)

    @property
    def adapter_digest(self) -> str:
        """SHA-256 (hex) of what changes answers: rank, projection, shapes, and name, alpha and file of each task."""
        content = {
            "rank": self.rank,
            "projection": dataclasses.asdict(self.projection),
            "modules": {name: [m.d_out, m.d_in] for name, m in self.modules.items()},
            "tasks": [[t.name, t.alpha, t.file.sha256] for t in self.tasks],
        }
        return hashlib.sha256(_canonical(content)).hexdigest()

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        content["adapter_digest"] = self.adapter_digest
        content["digest"] = hashlib.sha256(_canonical(content)).hexdigest()
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read(folder: Path) -> Manifest:
    """Reads and checks `loraf.json`; opens no other file.

    Raises:
        CheckpointError: there is no checkpoint in `folder`, or it has a format version this release does not know.
        CorruptCheckpoint: the manifest is malformed or was changed.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        remedy = "name a folder written by `loraf-train run`"
        raise CheckpointError(Problem(f"there is no {FILE_NAME}", file=str(folder), remedy=remedy)) from None
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "", f"is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _corrupt(path, "format", f"is not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        message = f"format version {content.get('format_version')} is not known (this release reads {FORMAT_VERSION})"
        remedy = "use a release of loraf that knows it"
        raise CheckpointError(Problem(message, "format_version", str(path), remedy))
    stated = content.pop("digest", None)
    if stated != hashlib.sha256(_canonical(content)).hexdigest():
        raise _corrupt(path, "digest", "does not match the manifest's content")
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(path, "", f"is malformed ({type(error).__name__}: {error})") from None
    problems = _inconsistencies(manifest, path)
    if problems:
        raise CorruptCheckpoint(problems)
    return manifest


def _corrupt(path: Path, where: str, message: str) -> CorruptCheckpoint:
    remedy = "restore the checkpoint from a copy, or train it again"
    return CorruptCheckpoint(Problem(message, where, str(path), remedy))


def _parse(content: dict[str, Any]) -> Manifest:
    def task(entry: dict[str, Any]) -> Task:
        known = {f.name for f in dataclasses.fields(Task)}
        entry = {key: value for key, value in entry.items() if key in known}
        entry |= {
            "file": StoredFile(**entry["file"]),
            "templates": Templates(**entry["templates"]),
            "trained_with": tuple(entry["trained_with"]),
            "scores": tuple(entry["scores"]),
        }
        return Task(**entry)

    return Manifest(
        base_model=BaseModel(**content["base_model"]),
        rank=content["rank"],
        projection=Projection(**content["projection"]),
        modules={name: Module(**entry) for name, entry in content["modules"].items()},
        tasks=tuple(task(entry) for entry in content["tasks"]),
    )


def _inconsistencies(manifest: Manifest, path: Path) -> list[Problem]:
    """What a well-formed manifest may still get wrong. A digest is no protection against its author."""
    problems: list[Problem] = []

    def check(condition: bool, where: str, message: str) -> None:
        if not condition:
            problems.append(Problem(message, where, str(path), "write the checkpoint with loraf's own tools"))

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31

    if not count(manifest.rank):
        check(False, "rank", f"{manifest.rank!r} is no rank")
        return problems
    seed, std = manifest.projection.seed, manifest.projection.init_std
    check(isinstance(seed, int) and not isinstance(seed, bool), "projection.seed", "is no integer")
    good_std = std is None or (isinstance(std, int | float) and math.isfinite(std) and std > 0)
    check(good_std, "projection.init_std", "is no positive number")
    check(bool(manifest.modules), "modules", "is empty")
    for name, module in manifest.modules.items():
        check(count(module.d_out) and count(module.d_in), f"modules.{name}", "has no valid shape")
    seen: list[str] = []
    for i, task in enumerate(manifest.tasks):
        where = f"tasks[{i}]"
        problem = name_problem(task.name, field=f"{where}.name", file=str(path))
        if problem:
            problems.append(problem)
            continue
        check(task.name not in seen, f"{where}.name", f"{task.name!r} stands twice")
        check(task.dtype in DTYPES, f"{where}.dtype", f"{task.dtype!r} is none of {', '.join(DTYPES)}")
        check(task.file.path == f"tasks/{task.name}.safetensors", f"{where}.file.path", "is not the task's own file")
        good_alpha = isinstance(task.alpha, int | float) and math.isfinite(task.alpha)
        check(good_alpha, f"{where}.alpha", f"{task.alpha!r} is no finite number")
        check(set(task.k) <= set(manifest.modules), f"{where}.k", "names modules that are not there")
        check(all(count(k) for k in task.k.values()), f"{where}.k", "holds a value that is no count")
        seen.append(task.name)
    return problems
