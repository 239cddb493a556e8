"""The manifest `loraf.json`: what a checkpoint holds, in plain JSON. Standard library only, so that reading is fast.

Two digests: `Manifest.digest` covers the whole manifest (a flipped bit anywhere is seen); `Manifest.adapter_digest`
covers what changes answers (projection, alphas, task files), never scores or dates, and names content in caches.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from loraf import strict_json
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem, UnknownTask
from loraf.tasksets import TaskSet, name_problem

FILE_NAME = "loraf.json"
FORMAT = "loraf"
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
_MAX_SIZE = 1 << 31  # of a dimension, and of A and B as a whole
_MAX_FACTOR = 1e20  # of alpha, and of 1/init_std: keeps float32 products away from infinity and from denormal numbers
_RESTORE = "restore the checkpoint from a copy, or train it again"


def positions(sparsity: float, d_out: int, rank: int) -> int:
    """K = ⌊(1 − s)·d_out·r⌋, the number of positions a task owns in one B.

    Exact: the sparsity is the decimal fraction that was written (0.9 is nine tenths), not its binary neighbour.

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    return int((1 - Fraction(str(sparsity))) * d_out * rank)


@dataclass(frozen=True)
class BaseModel:
    """The model a checkpoint was trained for.

    Attributes:
        shapes: the numbers of its config that fix tensor shapes (hidden_size, num_hidden_layers, …).
        fingerprint: digest of sampled weights, see `loraf.base_model.fingerprint`.
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
    """How records became text: `str.format` templates over a record's fields.

    Attributes:
        special_tokens: the tokenizer adds its own to the prompt; false for a conversation, whose chat template has
            written them.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"
    special_tokens: bool = True


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
            UnknownTask: `name`, or a task it was trained on top of, is not in this checkpoint (or not chosen), or that
                task was trained again since.
        """
        below = self.task(name).trained_with
        earlier = self.task_names[: self.task_names.index(name)]  # a task that was removed and trained again is later
        missing = [n for n in below if n not in earlier]
        if missing:
            message = f"task {name!r} was trained on top of {', '.join(missing)}, which this checkpoint does not have"
            remedy = "load the checkpoint with those tasks too, or name the tasks to use one by one"
            raise UnknownTask(Problem(message, "tasks", remedy=remedy))
        return TaskSet.of(dict.fromkeys((*below, name), 1.0), self.task_names)

    def all_tasks(self) -> TaskSet:
        return TaskSet.of(dict.fromkeys(self.task_names, 1.0), self.task_names)

    def only(self, names: tuple[str, ...]) -> Manifest:
        """The same checkpoint as if it had only these tasks. Raises UnknownTask, which names every unknown one."""
        TaskSet.of(dict.fromkeys(names, 1.0), self.task_names)
        return dataclasses.replace(self, tasks=tuple(t for t in self.tasks if t.name in names))

    def free_positions(self, module: str) -> int:
        """Positions of one B that no task owns."""
        return self.modules[module].d_out * self.rank - sum(task.k.get(module, 0) for task in self.tasks)

    @property
    def adapter_digest(self) -> str:
        """SHA-256 (hex) of what changes answers: rank, projection, shapes, and name, alpha and file of each task."""
        std = self.projection.init_std
        content = {
            "rank": self.rank,
            "projection": dataclasses.asdict(self.projection) | {"init_std": None if std is None else float(std)},
            "modules": {name: [m.d_out, m.d_in] for name, m in self.modules.items()},
            "tasks": [[t.name, float(t.alpha), t.file.sha256] for t in self.tasks],
        }
        return _digest(content)

    def to_json(self) -> str:
        """The text of `loraf.json`.

        Raises:
            ValueError, TypeError: a value has no JSON form (NaN in a score, an object in `training`).
        """
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        content = strict_json.plain(content)  # so that the digest is over what a reader gets
        content["adapter_digest"] = self.adapter_digest
        content["digest"] = _digest(content)
        return strict_json.dumps(content, indent=1).decode() + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(strict_json.dumps(content, sort_keys=True)).hexdigest()


def read(folder: Path) -> Manifest:
    """Reads and checks `loraf.json`; opens no other file.

    Raises:
        CheckpointError: there is no checkpoint in `folder`, or it has a format version this release does not know.
        CorruptCheckpoint: the manifest is malformed or was changed.
    """
    path = Path(folder) / FILE_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        remedy = "name a folder written by `loraf-train run`"
        raise CheckpointError(Problem(f"there is no {FILE_NAME}", file=str(folder), remedy=remedy)) from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        remedy = "name a folder written by `loraf-train run`, and allow this user to read it"
        raise CheckpointError(Problem(f"cannot be read ({error})", file=str(path), remedy=remedy)) from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`, checked. `path` is the file that messages name. Raises as `read`."""
    file = str(path)
    try:
        content = strict_json.loads(data)
    except ValueError as error:
        raise CorruptCheckpoint(Problem(f"is not JSON ({error})", "", file, _RESTORE)) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptCheckpoint(Problem(f"is not {FORMAT!r}", "format", file, _RESTORE))
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        message = f"format version {version!r} is not known (this release reads {FORMAT_VERSION})"
        raise CheckpointError(Problem(message, "format_version", file, "use a release of loraf that knows it"))
    stated = content.pop("digest", None)
    if stated != _digest(content):
        raise CorruptCheckpoint(Problem("does not match the manifest's content", "digest", file, _RESTORE))
    problems: list[Problem] = []

    def report(where: str, message: str) -> None:
        remedy = "use the release of loraf that wrote it" if message.endswith("known field") else _RESTORE
        problems.append(Problem(message, where, file, remedy))

    adapter_digest = content.pop("adapter_digest", None)
    del content["format"], content["format_version"]
    manifest = strict_json.build(Manifest, content, "", report)
    if manifest is not None:
        inconsistencies(manifest, report)
    if not problems and adapter_digest != manifest.adapter_digest:
        report("adapter_digest", "is not the digest of the projection, alphas and task files")
    if problems:
        raise CorruptCheckpoint(problems)
    return manifest


def inconsistencies(manifest: Manifest, report: Callable[[str, str], None]) -> None:
    """What a manifest of the right types may still get wrong. A digest is no protection against its author.

    Args:
        report: called with (field, message) for every mistake.
    """

    def check(condition: bool, where: str, message: str) -> None:
        if not condition:
            report(where, message)

    rank, std = manifest.rank, manifest.projection.init_std
    check(std is None or 1 / _MAX_FACTOR <= std <= _MAX_FACTOR, "projection.init_std", f"{std} is out of range")
    check(bool(manifest.modules), "modules", "is empty")
    check(0 < rank < _MAX_SIZE, "rank", f"{rank} is no rank")
    for name, module in manifest.modules.items():
        fits = all(size > 0 and size * max(1, rank) < _MAX_SIZE for size in (module.d_out, module.d_in))
        check(fits, f"modules.{name}", f"has no valid shape ({module.d_out} × {module.d_in}, rank {rank})")
    seen: set[str] = set()
    for i, task in enumerate(manifest.tasks):
        where = f"tasks[{i}]"
        problem = name_problem(task.name)
        check(problem is None, f"{where}.name", problem.message if problem else "")
        check(task.name not in seen, f"{where}.name", f"{task.name!r} stands twice")
        check(task.dtype in DTYPES, f"{where}.dtype", f"{task.dtype!r} is none of {', '.join(DTYPES)}")
        check(task.file.path == f"tasks/{task.name}.safetensors", f"{where}.file.path", "is not the task's own file")
        check(abs(task.alpha) <= _MAX_FACTOR, f"{where}.alpha", f"{task.alpha} is out of range")
        distinct = len({*task.trained_with, task.name}) == len(task.trained_with) + 1
        check(distinct, f"{where}.trained_with", "names a task twice, or the task itself")
        if 0 <= task.sparsity < 1:
            k = {name: positions(task.sparsity, module.d_out, rank) for name, module in manifest.modules.items()}
            odd = ", ".join(sorted(name for name in k.keys() | task.k.keys() if k.get(name) != task.k.get(name))[:4])
            check(task.k == k, f"{where}.k", f"is not ⌊(1 − sparsity)·d_out·rank⌋ of every module ({odd})")
        else:
            report(f"{where}.sparsity", f"{task.sparsity} is not in [0, 1)")
        seen.add(task.name)
