"""Reading and writing a checkpoint folder.

    loraf.json                   the manifest (loraf.manifest)
    tasks/<name>.safetensors     per module: <module>.rows, <module>.cols, <module>.values

A file is read once: its bytes are hashed and the same bytes are parsed, never a memory map of a file that may change.
A save writes new files beside the old ones, flushes them, and replaces the manifest last, so that a checkpoint is at
any moment the one before or the one after. A finished task's file is never written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from loraf import manifest as manifests
from loraf import projection
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem
from loraf.manifest import BaseModel, Manifest, Module, Projection, StoredFile, Task, Templates, positions
from loraf.sparse import SparseB
from loraf.tasksets import name_problem

_RESTORE = "restore the checkpoint from a copy, or train it again"
_MEND = "give values that the checkpoint can hold"
_PLAIN_TEMPLATES = Templates()


class Checkpoint:
    """A checkpoint whose chosen tasks are in memory and verified.

    Attributes:
        path: its folder.
        manifest: what it holds (restricted to the chosen tasks).
        tasks: task → module → SparseB.
    """

    def __init__(self, path: Path, manifest: Manifest, tasks: dict[str, dict[str, SparseB]], partial: bool = False):
        self.path = path
        self.manifest = manifest
        self.tasks = tasks
        self._partial = partial  # some tasks left out: writing would lose them

    @classmethod
    def open(cls, path: str | Path, tasks: Sequence[str] | None = None) -> Checkpoint:
        """Reads the manifest and the chosen tasks' files (all by default), and verifies every byte of them.

        The projection is verified when it is built: `projection_of`, or `verify_projection` for all modules.

        Raises:
            CheckpointError, CorruptCheckpoint: see `manifest.read`; every damaged file is named.
            UnknownTask: a chosen task is not there.
        """
        path = Path(path)
        manifest = manifests.read(path)
        everything = manifest.task_names
        if tasks is not None:
            manifest = manifest.only(tuple(tasks))
        if manifest.projection.generator != projection.GENERATOR:
            message = f"{manifest.projection.generator!r} is not known (this release has {projection.GENERATOR!r})"
            remedy = "use a release of loraf that knows it"
            where = str(path / manifests.FILE_NAME)
            raise CheckpointError(Problem(message, "projection.generator", where, remedy))
        problems: list[Problem] = []
        module_digests = {name: module.projection_sha256 for name, module in manifest.modules.items()}
        if projection.combined_digest(module_digests) != manifest.projection.sha256:
            message = "is not the digest of the modules' own digests"
            problems.append(Problem(message, "projection.sha256", str(path / manifests.FILE_NAME), _RESTORE))
        loaded: dict[str, dict[str, SparseB]] = {}
        for task in manifest.tasks:
            loaded[task.name] = _read_task(path, manifest, task, problems)
        if not problems:
            problems += _overlaps(path, manifest, loaded, _RESTORE)
        if problems:
            raise CorruptCheckpoint(problems)
        return cls(path, manifest, loaded, partial=manifest.task_names != everything)

    @classmethod
    def create(
        cls,
        path: str | Path,
        base_model: BaseModel,
        rank: int,
        modules: Mapping[str, tuple[int, int]],
        seed: int,
        init_std: float | None = None,
    ) -> Checkpoint:
        """A new checkpoint without tasks; computes the digest of A.

        Args:
            modules: name → (d_out, d_in) of its weight.

        Raises:
            CheckpointError: `path` already holds a checkpoint or cannot be written, or a value makes no sense (a rank
                of 0, no modules, a standard deviation that is not positive). Nothing is written then.
        """
        path = Path(path)
        if os.path.exists(path / manifests.FILE_NAME):
            raise CheckpointError(Problem("a checkpoint is already there", file=str(path), remedy="open it instead"))
        unmade = Manifest(
            base_model=base_model,
            rank=rank,
            projection=Projection(projection.GENERATOR, seed, "", init_std),
            modules={name: Module(*shape, "") for name, shape in modules.items()},
        )
        _encoded(unmade, path)  # A is made only for values that can be written
        digests = projection.digests(seed, rank, dict(modules), init_std)
        manifest = dataclasses.replace(
            unmade,
            projection=dataclasses.replace(unmade.projection, sha256=projection.combined_digest(digests)),
            modules={name: Module(*shape, digests[name]) for name, shape in modules.items()},
        )
        manifest, data = _encoded(manifest, path)
        try:
            (path / "tasks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from None
        _write_durably(path / manifests.FILE_NAME, data)
        return cls(path, manifest, {})

    def add_task(
        self,
        name: str,
        values: Mapping[str, SparseB],
        *,
        alpha: float,
        sparsity: float,
        trained_with: Sequence[str] = (),
        templates: Templates = _PLAIN_TEMPLATES,
        training: Mapping[str, Any] | None = None,
    ) -> Task:
        """Commits a finished task: its file first, then the manifest. Values are stored in the dtype they have.

        Raises:
            CheckpointError: the name is taken or invalid, a mask overlaps another task's or has not exactly
                K = ⌊(1 − s)·d_out·r⌋ positions, a value is not finite, a setting has no JSON form, or the folder was
                changed by another process. Nothing is written then.
        """
        self._require_whole()
        file = str(self.path / f"tasks/{name}.safetensors")
        problem = name_problem(name, file=str(self.path))
        if name in self.manifest.task_names:
            problem = Problem(f"task {name!r} is already there", "name", str(self.path), "choose another name")
        if problem:
            raise CheckpointError(problem)
        if not 0 <= sparsity < 1:
            raise CheckpointError(Problem(f"{sparsity} is not in [0, 1)", "sparsity", file, _MEND))
        absent = [other for other in trained_with if other not in self.manifest.task_names]
        if absent:
            raise CheckpointError(Problem(f"there is no task {', '.join(absent)}", "trained_with", file, _MEND))
        dtypes = {str(b.values.dtype).removeprefix("torch.") for b in values.values()}
        if len(dtypes) != 1 or not dtypes <= set(manifests.DTYPES):
            message = f"values must all be of one dtype out of {', '.join(manifests.DTYPES)}"
            raise CheckpointError(Problem(message, "dtype", file, _MEND))
        task = Task(
            name=name,
            alpha=alpha,
            sparsity=sparsity,
            dtype=dtypes.pop(),
            file=StoredFile(f"tasks/{name}.safetensors", 0, ""),
            k={
                module: positions(sparsity, shape.d_out, self.manifest.rank)
                for module, shape in self.manifest.modules.items()
            },
            trained_with=tuple(trained_with),
            templates=templates,
            training=dict(training or {}),
        )
        tasks = self.tasks | {name: dict(values)}
        problems = _faults(self.path, self.manifest, task, tasks[name], _MEND)
        problems = problems or _overlaps(self.path, self.manifest, tasks, _MEND)
        if problems:
            raise CheckpointError(problems)
        data = safetensors.torch.save(_tensors(values))
        stored = StoredFile(task.file.path, len(data), hashlib.sha256(data).hexdigest())
        task = dataclasses.replace(task, file=stored)
        self._commit((*self.manifest.tasks, task), {self.path / stored.path: data})
        self.tasks = tasks
        return self.manifest.task(name)

    def set_scores(self, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
        """Replaces a task's scores in the manifest; the adapter digest stays.

        Raises:
            UnknownTask: there is no such task.
            CheckpointError: a score has no JSON form (NaN, say), or the folder was changed by another process. Nothing
                is written then.
        """
        self.manifest.task(name)
        self._commit(
            tuple(
                dataclasses.replace(t, scores=tuple(dict(s) for s in scores)) if t.name == name else t
                for t in self.manifest.tasks
            )
        )

    def _commit(self, tasks: tuple[Task, ...], new_files: Mapping[Path, bytes] | None = None) -> None:
        """Writes new files, then the manifest with `tasks`; what is in memory changes only when all is on disk."""
        self._require_whole()
        manifest, data = _encoded(dataclasses.replace(self.manifest, tasks=tasks), self.path)
        self._require_unchanged()
        for path, content in (new_files or {}).items():
            _write_durably(path, content)
        _write_durably(self.path / manifests.FILE_NAME, data)
        self.manifest = manifest

    def _require_unchanged(self) -> None:
        """Refuses to write over what another process wrote: its tasks would be lost."""
        if manifests.read(self.path).to_json() != self.manifest.to_json():
            message = "was changed by another process since it was read"
            remedy = "open the checkpoint again; let one process at a time write to it"
            raise CheckpointError(Problem(message, file=str(self.path / manifests.FILE_NAME), remedy=remedy))

    def _require_whole(self) -> None:
        if self._partial:
            message = "only some of its tasks were read, so it cannot be written"
            raise CheckpointError(Problem(message, file=str(self.path), remedy="open it with all tasks"))

    def projection_of(self, module: str) -> torch.Tensor:
        """A of one module, float32 (rank, d_in), rebuilt from the seed and checked against its digest.

        Raises:
            CorruptCheckpoint: the seed, generator or shape is not the one that the digest was made with.
        """
        spec = self.manifest.modules[module]
        p = self.manifest.projection
        a = projection.projection(p.seed, module, self.manifest.rank, spec.d_in, p.init_std)
        self._require_digests({module: projection.digest(a)})
        return torch.from_numpy(a)

    def verify_projection(self) -> None:
        """Rebuilds A of every module and checks every digest. Raises CorruptCheckpoint."""
        p = self.manifest.projection
        shapes = {name: (m.d_out, m.d_in) for name, m in self.manifest.modules.items()}
        found = projection.digests(p.seed, self.manifest.rank, shapes, p.init_std)
        self._require_digests(found)

    def _require_digests(self, found: Mapping[str, str]) -> None:
        stated = self.manifest.modules
        message = "A rebuilt from the seed is not the A that the tasks were trained with"
        remedy = f"seed, standard deviation, rank or shape was changed: {_RESTORE}"
        problems = [
            Problem(message, f"modules.{module}.projection_sha256", str(self.path / manifests.FILE_NAME), remedy)
            for module, digest in found.items()
            if digest != stated[module].projection_sha256
        ]
        if problems:
            raise CorruptCheckpoint(problems)


def _encoded(manifest: Manifest, path: Path) -> tuple[Manifest, bytes]:
    """The manifest as it will be read back, and the bytes to write.

    Raises:
        CheckpointError: it could not be read back.
    """
    file = path / manifests.FILE_NAME
    problems: list[Problem] = []
    try:
        manifests.inconsistencies(manifest, lambda where, text: problems.append(Problem(text, where, str(file), _MEND)))
        if not problems:
            data = manifest.to_json().encode()
            return manifests.parse(data, file), data
    except CorruptCheckpoint as error:
        problems += (dataclasses.replace(problem, remedy=_MEND) for problem in error.problems)
    except (TypeError, ValueError) as error:
        problems.append(Problem(f"cannot be written ({error})", "", str(file), _MEND))
    raise CheckpointError(problems)


def _tensors(values: Mapping[str, SparseB]) -> dict[str, torch.Tensor]:
    """The content of a task's file."""
    parts = ("rows", "cols", "values")
    return {f"{module}.{part}": getattr(b, part).contiguous() for module, b in values.items() for part in parts}


def _read_task(path: Path, manifest: Manifest, task: Task, problems: list[Problem]) -> dict[str, SparseB]:
    file = path / task.file.path
    try:
        data = file.read_bytes()
    except OSError as error:
        problems.append(Problem(f"cannot be read ({error.strerror})", file=str(file), remedy=_RESTORE))
        return {}
    if len(data) != task.file.bytes or hashlib.sha256(data).hexdigest() != task.file.sha256:
        message = f"is not the file that the manifest names ({len(data)} bytes, {task.file.bytes} expected)"
        if len(data) == task.file.bytes:
            message = "is not the file that the manifest names (its SHA-256 differs)"
        problems.append(Problem(message, file=str(file), remedy=_RESTORE))
        return {}
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors has one exception class for everything
        problems.append(Problem(f"is no safetensors file ({error})", file=str(file), remedy=_RESTORE))
        return {}
    expected = {f"{module}.{part}" for module in task.k for part in ("rows", "cols", "values")}
    if set(tensors) != expected:
        odd = ", ".join(sorted(set(tensors) ^ expected)[:4])
        message = f"holds other tensors than the manifest names ({odd})"
        problems.append(Problem(message, file=str(file), remedy=_RESTORE))
        return {}
    loaded = {
        module: SparseB(
            tensors[f"{module}.rows"],
            tensors[f"{module}.cols"],
            tensors[f"{module}.values"],
            (manifest.modules[module].d_out, manifest.rank),
        )
        for module in task.k
    }
    problems += _faults(path, manifest, task, loaded, _RESTORE)
    return loaded


def _faults(path: Path, manifest: Manifest, task: Task, loaded: Mapping[str, SparseB], remedy: str) -> list[Problem]:
    """What is wrong within one task."""
    file = str(path / task.file.path)
    problems = []
    if set(loaded) != set(task.k):
        odd = ", ".join(sorted(set(loaded) ^ set(task.k))[:4])
        return [Problem(f"modules differ from the checkpoint's ({odd})", file=file, remedy="give every target module")]
    for module, b in loaded.items():
        spec = manifest.modules[module]
        fault = "the matrix has another shape" if b.shape != (spec.d_out, manifest.rank) else b.fault()
        if fault is None and len(b.values) != task.k[module]:
            fault = f"has {len(b.values)} positions, K is {task.k[module]}"
        if fault is None and b.values.dtype != getattr(torch, task.dtype):
            fault = f"values are {b.values.dtype}, the manifest says {task.dtype}"
        if fault:
            problems.append(Problem(fault, module, file, remedy))
    return problems


def _overlaps(path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], remedy: str) -> list[Problem]:
    """Positions that two tasks both own."""
    problems = []
    names = list(tasks)
    for module, spec in manifest.modules.items():
        owner = np.zeros(spec.d_out * manifest.rank, dtype=np.int32)  # 0: free; else number of the task, from 1
        for number, name in enumerate(names, 1):
            flat = tasks[name][module].flat.numpy()
            held = owner[flat]
            for other, count in zip(*np.unique(held[held > 0], return_counts=True), strict=True):
                message = f"task {name!r} holds {count} positions of task {names[other - 1]!r}"
                problems.append(Problem(message, module, str(path / f"tasks/{name}.safetensors"), remedy))
            owner[flat] = number
    return problems


def _unwritable(target: Path, error: OSError) -> CheckpointError:
    remedy = "make room on the disk, or name a folder that may be written"
    return CheckpointError(Problem(f"cannot be written ({error.strerror or error})", file=str(target), remedy=remedy))


def _write_durably(target: Path, data: bytes) -> None:
    """Writes beside `target`, flushes to disk, then renames: a reader sees the old file or the new one, never half.

    Raises:
        CheckpointError: the operating system refused (disk full, no permission).
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unwritable(target, error) from error
