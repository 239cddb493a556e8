"""The manifest `loraf.json`: what a checkpoint holds, in plain JSON. Standard library only, so that reading is fast.

It has two digests. `digest` covers the whole file, so that any flipped bit is detected. `adapter_digest` covers what
the model's output depends on (projection, alphas, task files), not scores, dates, statistics or named sets. It
identifies content in caches.

A manifest without statistics and named sets is written as format version 1, which has no field for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from loraf import set_record, task_record
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem, UnknownTask
from loraf.files import strict_json
from loraf.files.bounded_file import read_bounded
from loraf.files.sealed_json import content_digest, seal
from loraf.limits import (
    MAX_DIMENSION,
    MAX_ENTRIES,
    MAX_FACTOR,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MODULES,
    MAX_NAME,
    MAX_RANK,
    MAX_TASKS,
    MAX_TEXT,
    index_bytes,
    statistics_bytes,
)
from loraf.tasksets import TaskSet, name_problem

FILE_NAME = "loraf.json"
FORMAT = "loraf"
PLAIN_VERSION = 1  # without statistics and named sets
EXTENDED_VERSION = 2
DTYPES = ("bfloat16", "float16", "float32")
_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_NO_NAME = f"is longer than {MAX_NAME} characters, or holds characters that cannot be shown"
_SHOWN = 100  # mistakes that are named
_RESTORE = "restore the checkpoint from a copy, or train it again"


def positions_per_matrix(sparsity: float, d_out: int, rank: int) -> int:
    """Returns K = ⌊(1 − s)·d_out·r⌋, the number of positions that a task owns in one B.

    Exact: takes the sparsity as the decimal fraction that was written (0.9 is nine tenths), not as a binary float.

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    return int((1 - Fraction(str(sparsity))) * d_out * rank)


@dataclass(frozen=True)
class BaseModel:
    """The model that a checkpoint was trained for.

    Attributes:
        fingerprint: digest of sampled weights, see `loraf.base_model.fingerprint`.
        revision: on the hub.
        shapes: the values of its config that determine tensor shapes (hidden_size, num_hidden_layers, …).
    """

    name: str
    architecture: str
    fingerprint: str
    revision: str | None = None
    shapes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """How A is generated.

    Attributes:
        generator: see `projection.GENERATOR`.
        sha256: see `projection.combined_digest`.
        init_std: standard deviation of A; None: 1/√(3·d_in) of each module.
    """

    generator: str
    seed: int
    sha256: str
    init_std: float | None = None


@dataclass(frozen=True)
class Module:
    """A target module: the shape of its weight (d_out, d_in) and the digest of its A (rank, d_in)."""

    d_out: int
    d_in: int
    projection_sha256: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the checkpoint. Its path is relative to the checkpoint's folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Templates:
    """How records were turned into text: `str.format` templates over a record's fields.

    Attributes:
        special_tokens: whether the tokenizer adds its special tokens to the prompt. False for conversations, where the
            chat template writes them.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"
    special_tokens: bool = True


@dataclass(frozen=True)
class Task:
    """A finished task.

    Attributes:
        alpha: ΔW of this task is scaled by alpha / rank.
        dtype: of the stored values, one of DTYPES.
        k: module → number of positions that the task owns there.
        trained_with: earlier tasks that were active while it was trained, in order.
        training: its provenance.
        scores: tuple of {"set", "evaluation", "metric", "score", "count"} measured after training.
        statistics: the file with what protects the task while later ones train; None: there is none.
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
    statistics: StoredFile | None = None

    @property
    def parameters(self) -> int:
        """Number of trained values in all modules."""
        return sum(self.k.values())


@dataclass(frozen=True)
class Manifest:
    """The content of `loraf.json`. Tasks are in the order in which they were trained.

    Attributes:
        sets: the named sets: name → task → weight.
    """

    base_model: BaseModel
    rank: int
    projection: Projection
    modules: dict[str, Module]
    tasks: tuple[Task, ...] = ()
    sets: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        """Returns the task of that name. Raises UnknownTask."""
        for task in self.tasks:
            if task.name == name:
                return task
        known = ", ".join(self.task_names) or "none"
        raise UnknownTask(Problem(f"there is no task {name!r}", "tasks", remedy=f"choose from: {known}"))

    def as_trained(self, name: str) -> TaskSet:
        """Returns the set that was active when `name` had just been trained: its `trained_with` and itself.

        Raises:
            UnknownTask: `name`, or a task that it was trained on top of, is not in this manifest, or has been trained
                again since.
        """
        trained_with = self.task(name).trained_with
        # A task that was removed and trained again comes later in the checkpoint.
        earlier = set(self.task_names[: self.task_names.index(name)])
        missing = [n for n in trained_with if n not in earlier]
        if missing:
            message = f"task {name!r} was trained on top of {', '.join(missing)}, which this checkpoint does not have"
            remedy = "load the checkpoint with those tasks too, or name the tasks to use one by one"
            raise UnknownTask(Problem(message, "tasks", remedy=remedy))
        return TaskSet.of(dict.fromkeys((*trained_with, name), 1.0), self.task_names)

    def all_tasks(self) -> TaskSet:
        """Returns the set of all tasks, each with weight 1."""
        return TaskSet.of(dict.fromkeys(self.task_names, 1.0), self.task_names)

    def named_set(self, name: str) -> TaskSet:
        """Returns a named set. Raises KeyError if there is no set of that name."""
        return TaskSet.of(self.sets[name], self.task_names)

    def only(self, names: tuple[str, ...]) -> Manifest:
        """Returns the manifest restricted to these tasks, and to the named sets that hold no other task.

        Raises:
            UnknownTask: lists all unknown names.
        """
        TaskSet.of(dict.fromkeys(names, 1.0), self.task_names)
        sets = {name: weights for name, weights in self.sets.items() if weights.keys() <= set(names)}
        return dataclasses.replace(self, tasks=tuple(t for t in self.tasks if t.name in names), sets=sets)

    def without_statistics(self) -> Manifest:
        """Returns the manifest of the same checkpoint without its statistics files."""
        return dataclasses.replace(self, tasks=tuple(dataclasses.replace(t, statistics=None) for t in self.tasks))

    def free_positions(self, module: str) -> int:
        """Returns the number of positions in one B that no task owns."""
        return self.modules[module].d_out * self.rank - sum(task.k.get(module, 0) for task in self.tasks)

    @property
    def adapter_digest(self) -> str:
        """SHA-256 (hex) over rank, projection, shapes, and the name, alpha and file of each task."""
        std = self.projection.init_std
        content = {
            "rank": self.rank,
            "projection": dataclasses.asdict(self.projection) | {"init_std": None if std is None else float(std)},
            "modules": {name: [m.d_out, m.d_in] for name, m in self.modules.items()},
            "tasks": [[t.name, float(t.alpha), t.file.sha256] for t in self.tasks],
        }
        return content_digest(content)

    @property
    def format_version(self) -> int:
        """The format version that this manifest is written as."""
        extended = self.sets or any(task.statistics is not None for task in self.tasks)
        return EXTENDED_VERSION if extended else PLAIN_VERSION

    def to_json(self) -> str:
        """Returns the text of `loraf.json`.

        Raises:
            ValueError, TypeError: a value has no JSON form (NaN in a score, an object in `training`).
        """
        content = dataclasses.asdict(self) | {"adapter_digest": self.adapter_digest}
        for task in content["tasks"]:
            if task["statistics"] is None:
                del task["statistics"]
        if not self.sets:
            del content["sets"]
        return seal(FORMAT, self.format_version, content).decode()


def read(folder: Path) -> Manifest:
    """Reads and checks `loraf.json`. Opens no other file.

    Raises:
        CheckpointError: `folder` holds no checkpoint, or one of an unknown format version.
        CorruptCheckpoint: the manifest is malformed or was changed.
    """
    path = Path(folder) / FILE_NAME
    try:
        data = read_bounded(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        remedy = "name a folder written by `loraf-train run`"
        raise CheckpointError(Problem(f"there is no {FILE_NAME}", file=str(folder), remedy=remedy)) from None
    except (OSError, ValueError) as error:  # ValueError: an invalid path, such as one with a null byte
        remedy = "name a folder written by `loraf-train run`, readable by this user"
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(Problem(f"cannot be read ({reason})", file=str(path), remedy=remedy)) from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> Manifest:
    """Parses and checks the bytes of a manifest. Raises the errors of `read`.

    Args:
        path: the file, for error messages.
    """
    file = str(path)
    try:
        content = strict_json.loads(data)
    except ValueError as error:
        raise CorruptCheckpoint(Problem(f"is not JSON ({error})", "", file, _RESTORE)) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptCheckpoint(Problem(f"is not {FORMAT!r}", "format", file, _RESTORE))
    version = content.get("format_version")
    if type(version) is not int or version not in (PLAIN_VERSION, EXTENDED_VERSION):
        stated = strict_json.shown(version)
        message = f"format version {stated} is unknown (this release reads {PLAIN_VERSION} and {EXTENDED_VERSION})"
        raise CheckpointError(Problem(message, "format_version", file, "use a release of loraf that reads it"))
    stated = content.pop("digest", None)
    if stated != content_digest(content):
        raise CorruptCheckpoint(Problem("does not match the manifest's content", "digest", file, _RESTORE))
    problems: list[Problem] = []

    def report(where: str, message: str) -> None:
        remedy = "use the release of loraf that wrote it" if message == strict_json.UNKNOWN_FIELD else _RESTORE
        problems.append(Problem(message, where, file, remedy))

    adapter_digest = content.pop("adapter_digest", None)
    del content["format"], content["format_version"]
    if version == PLAIN_VERSION:
        _refuse_later_fields(content, report)
    manifest = strict_json.build(Manifest, content, "", report)
    if manifest is not None:
        inconsistencies(manifest, report)
        if not problems and adapter_digest != manifest.adapter_digest:
            report("adapter_digest", "is not the digest of the projection, alphas and task files")
    if manifest is None or problems:
        more = len(problems) - _SHOWN
        if more > 0:
            problems[_SHOWN:] = [Problem(f"{more} more fields have mistakes", "", file, _RESTORE)]
        raise CorruptCheckpoint(problems)
    return manifest


def _refuse_later_fields(content: dict[str, Any], report: Callable[[str, str], None]) -> None:
    """Reports the fields that version 1 does not have."""
    if "sets" in content:
        report("sets", strict_json.UNKNOWN_FIELD)
    tasks = content.get("tasks")
    for i, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict) and "statistics" in task:
            report(f"tasks[{i}].statistics", strict_json.UNKNOWN_FIELD)


def inconsistencies(manifest: Manifest, report: Callable[[str, str], None]) -> None:
    """Reports inconsistent values in a manifest whose types are right. A matching digest does not exclude them.

    Args:
        report: called with (field, message) for every mistake.
    """

    def check(condition: bool, where: str, message: str) -> None:
        if not condition:
            report(where, message)

    rank, std, base = manifest.rank, manifest.projection.init_std, manifest.base_model
    for name in ("name", "architecture", "fingerprint", "revision"):
        check(_is_name(getattr(base, name) or ""), f"base_model.{name}", _NO_NAME)
    check(_is_name(manifest.projection.generator), "projection.generator", _NO_NAME)
    check(std is None or 1 / MAX_FACTOR <= std <= MAX_FACTOR, "projection.init_std", f"{std} is out of range")
    check(0 < len(manifest.modules) <= MAX_MODULES, "modules", f"has {len(manifest.modules)} entries")
    check(0 < rank <= MAX_RANK, "rank", f"{rank} is not a rank from 1 to {MAX_RANK:,}")
    for name, module in manifest.modules.items():
        sizes = (module.d_out, module.d_in)
        fits = all(0 < size <= MAX_DIMENSION and size * max(1, rank) < MAX_ENTRIES for size in sizes)
        where = f"modules.{strict_json.shown_name(name)}"
        check(fits, where, f"has no valid shape ({module.d_out} × {module.d_in}, rank {rank})")
        check(name.isprintable() and 0 < len(name) <= MAX_NAME, f"modules.{name[:MAX_NAME]!r}", _NO_NAME)
    check(len(manifest.tasks) <= MAX_TASKS, "tasks", f"has more than {MAX_TASKS:,} entries")
    seen: set[str] = set()
    for i, task in enumerate(manifest.tasks):
        where = f"tasks[{i}]"
        problem = name_problem(task.name)
        check(problem is None, f"{where}.name", problem.message if problem else "")
        check(task.name not in seen, f"{where}.name", f"task name {_shown(task.name)} is used twice")
        seen.add(task.name)
        _check_task(manifest, task, where, report)
    set_record.check_sets(manifest.sets, seen, report)


def _check_task(manifest: Manifest, task: Task, where: str, report: Callable[[str, str], None]) -> None:
    """Reports inconsistent values of one task, apart from its name."""
    path = f"tasks/{task.name}.safetensors"
    if task.file.path != path:
        report(f"{where}.file.path", f"is not {_shown(path)}")
    if task.dtype not in DTYPES:
        report(f"{where}.dtype", f"{_shown(task.dtype)} is not one of {', '.join(DTYPES)}")
    if not abs(task.alpha) <= MAX_FACTOR:
        report(f"{where}.alpha", f"{task.alpha} is out of range")
    if len({*task.trained_with, task.name}) != len(task.trained_with) + 1:
        report(f"{where}.trained_with", "names a task twice, or the task itself")
    if len(task.trained_with) > MAX_TASKS or any(name_problem(name) for name in task.trained_with):
        report(f"{where}.trained_with", "holds what is not a task's name, or too many names")
    for name in ("prompt", "completion"):
        if len(getattr(task.templates, name)) > MAX_TEXT:
            report(f"{where}.templates.{name}", f"is longer than {MAX_TEXT:,} characters")
    if task.statistics is not None:
        _check_statistics(manifest, task.name, task.statistics, f"{where}.statistics", report)
    task_record.check_training(task.training, f"{where}.training", report)
    task_record.check_scores(task.scores, f"{where}.scores", report)
    if not 0 <= task.sparsity < 1:
        report(f"{where}.sparsity", f"{task.sparsity} is not in [0, 1)")
        return
    rank = manifest.rank
    k = {name: positions_per_matrix(task.sparsity, m.d_out, rank) for name, m in manifest.modules.items()}
    if task.k != k:
        differing = sorted(name for name in k.keys() | task.k.keys() if k.get(name) != task.k.get(name))[:4]
        names = ", ".join(map(strict_json.shown_name, differing))
        message = f"is not ⌊(1 − sparsity)·d_out·rank⌋ for every module ({names})"
        report(f"{where}.k", message)
    elif task.dtype in DTYPES:
        of_a_position = index_bytes(rank) + _VALUE_BYTES[task.dtype]
        tensors = sum(count * (index_bytes(manifest.modules[name].d_out) + of_a_position) for name, count in k.items())
        if not 0 <= task.file.bytes <= tensors + MAX_HEADER_BYTES + 8:
            report(f"{where}.file.bytes", f"{task.file.bytes} is not the size of a file of {tensors:,} bytes of values")


def _check_statistics(
    manifest: Manifest, task: str, stored: StoredFile, where: str, report: Callable[[str, str], None]
) -> None:
    """Reports inconsistent values of a task's statistics file."""
    path = f"statistics/{task}.safetensors"
    if stored.path != path:
        report(f"{where}.path", f"is not {_shown(path)}")
    rows = sum(module.d_out for module in manifest.modules.values())
    most = statistics_bytes(rows, len(manifest.modules), manifest.rank)
    if not 0 <= stored.bytes <= most:
        report(f"{where}.bytes", f"{stored.bytes} is not a size up to {most:,}")


def _shown(text: str) -> str:
    return strict_json.shown(text, strict_json.LONGEST_NAME)


def _is_name(text: str) -> bool:
    """Whether a text may stand in a message and name a file or a repository. It may be empty."""
    return len(text) <= MAX_NAME and not task_record.has_controls(text)
