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
        loaded: dict[str, dict[str, SparseB]] = {}
        for task in manifest.tasks:
            loaded[task.name] = _read_task(path, manifest, task, problems)
        if not problems:
            problems += _overlaps(path, manifest, loaded)
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
            CheckpointError: `path` already holds a checkpoint.
        """
        path = Path(path)
        if (path / manifests.FILE_NAME).exists():
            raise CheckpointError(Problem("a checkpoint is already there", file=str(path), remedy="open it instead"))
        digests = projection.digests(seed, rank, dict(modules), init_std)
        manifest = Manifest(
            base_model=base_model,
            rank=rank,
            projection=Projection(projection.GENERATOR, seed, projection.combined_digest(digests), init_std),
            modules={name: Module(*shape, digests[name]) for name, shape in modules.items()},
        )
        (path / "tasks").mkdir(parents=True, exist_ok=True)
        _write_durably(path / manifests.FILE_NAME, manifest.to_json().encode())
        return cls(path, manifest, {})

    def add_task(
        self,
        name: str,
        values: Mapping[str, SparseB],
        *,
        alpha: float,
        sparsity: float,
        trained_with: Sequence[str] = (),
        templates: Templates = Templates(),
        training: Mapping[str, Any] | None = None,
    ) -> Task:
        """Commits a finished task: its file first, then the manifest. Values are stored in the dtype they have.

        Raises:
            CheckpointError: the name is taken or invalid, a mask overlaps another task's or has not exactly
                K = ⌊(1 − s)·d_out·r⌋ positions, a value is not finite. Nothing is written then.
        """
        self._require_whole()
        problem = name_problem(name)
        if problem or name in self.manifest.task_names:
            raise CheckpointError(problem or Problem(f"task {name!r} is already there", remedy="choose another name"))
        dtypes = {str(b.values.dtype).removeprefix("torch.") for b in values.values()}
        if len(dtypes) != 1 or not dtypes <= set(manifests.DTYPES):
            raise CheckpointError(
                f"task {name!r}: values must all be of one dtype out of {', '.join(manifests.DTYPES)}"
            )
        tensors: dict[str, torch.Tensor] = {}
        for module, b in values.items():
            tensors |= {f"{module}.rows": b.rows, f"{module}.cols": b.cols, f"{module}.values": b.values}
        data = safetensors.torch.save(tensors)
        stored = StoredFile(f"tasks/{name}.safetensors", len(data), hashlib.sha256(data).hexdigest())
        task = Task(
            name=name,
            alpha=alpha,
            sparsity=sparsity,
            dtype=dtypes.pop(),
            file=stored,
            k={
                module: positions(sparsity, shape.d_out, self.manifest.rank)
                for module, shape in self.manifest.modules.items()
            },
            trained_with=tuple(trained_with),
            templates=templates,
            training=dict(training or {}),
        )
        manifest = dataclasses.replace(self.manifest, tasks=(*self.manifest.tasks, task))
        tasks = self.tasks | {name: dict(values)}
        problems = _faults(self.path, manifest, task, tasks[name]) or _overlaps(self.path, manifest, tasks)
        if problems:
            raise CheckpointError(problems)
        _write_durably(self.path / stored.path, data)
        _write_durably(self.path / manifests.FILE_NAME, manifest.to_json().encode())
        self.manifest, self.tasks = manifest, tasks
        return task

    def set_scores(self, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
        """Replaces a task's scores in the manifest; the adapter digest stays."""
        self._require_whole()
        self.manifest.task(name)
        tasks = tuple(
            dataclasses.replace(t, scores=tuple(dict(s) for s in scores)) if t.name == name else t
            for t in self.manifest.tasks
        )
        self.manifest = dataclasses.replace(self.manifest, tasks=tasks)
        _write_durably(self.path / manifests.FILE_NAME, self.manifest.to_json().encode())

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
        self._require_digest(module, projection.digest(a))
        return torch.from_numpy(np.asarray(a))

    def verify_projection(self) -> None:
        """Rebuilds A of every module and checks every digest. Raises CorruptCheckpoint."""
        p = self.manifest.projection
        shapes = {name: (m.d_out, m.d_in) for name, m in self.manifest.modules.items()}
        found = projection.digests(p.seed, self.manifest.rank, shapes, p.init_std)
        for module, digest in found.items():
            self._require_digest(module, digest)
        if projection.combined_digest(found) != p.sha256:
            raise CorruptCheckpoint(self._projection_problem("projection.sha256"))

    def _require_digest(self, module: str, digest: str) -> None:
        if digest != self.manifest.modules[module].projection_sha256:
            raise CorruptCheckpoint(self._projection_problem(f"modules.{module}.projection_sha256"))

    def _projection_problem(self, where: str) -> Problem:
        message = (
            "A rebuilt from the seed is not the A that the tasks were trained with (seed, std or shape was changed)"
        )
        return Problem(message, where, str(self.path / manifests.FILE_NAME), _RESTORE)


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
        problems.append(
            Problem(f"holds other tensors than the manifest names ({odd})", file=str(file), remedy=_RESTORE)
        )
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
    problems += _faults(path, manifest, task, loaded)
    return loaded


def _faults(path: Path, manifest: Manifest, task: Task, loaded: Mapping[str, SparseB]) -> list[Problem]:
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
            problems.append(Problem(fault, module, file, _RESTORE))
    return problems


def _overlaps(path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]]) -> list[Problem]:
    """Positions that two tasks both own."""
    problems = []
    for module, spec in manifest.modules.items():
        owner = np.zeros(spec.d_out * manifest.rank, dtype=np.uint8)
        for name, loaded in tasks.items():
            if module not in loaded:
                continue
            flat = loaded[module].flat.numpy()
            if owner[flat].any():
                message = f"task {name!r} holds a position of another task"
                problems.append(Problem(message, module, str(path / f"tasks/{name}.safetensors"), _RESTORE))
            owner[flat] = 1
    return problems


def _write_durably(target: Path, data: bytes) -> None:
    """Writes beside `target`, flushes to disk, then renames: a reader sees the old file or the new one, never half."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
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
