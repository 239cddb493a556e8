"""Reading and writing a checkpoint folder.

    loraf.json                   the manifest (loraf.manifest)
    tasks/<name>.safetensors     per module: <module>.rows, <module>.cols, <module>.values (loraf.task_file)
    statistics/<name>.safetensors  optional: what protects the task while later ones train; read only on request

A save writes new files under temporary names, flushes and renames them, and replaces the manifest last. So at every
moment the folder holds either the old checkpoint or the new one. The file of a finished task is never written again.
What a killed save left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraf import manifest as manifests
from loraf import task_file
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem
from loraf.files.bounded_file import read_bounded
from loraf.files.durable_folder import flush_folder, make_durably, remove_leftovers, temporary_name
from loraf.manifest import BaseModel, Manifest, Module, Projection, StoredFile, Task, Templates, positions_per_matrix
from loraf.manifest_view import CheckpointManifestView, read_manifest
from loraf.matrices import projection
from loraf.matrices.sparse import SparseB
from loraf.tasksets import name_problem

_REMEDY = "use values that a checkpoint can hold"
_PLAIN_TEMPLATES = Templates()


class Checkpoint(CheckpointManifestView):
    """A checkpoint whose selected tasks are in memory and verified.

    Attributes:
        tasks: task → module → SparseB.
    """

    def __init__(self, path: Path, manifest: Manifest, tasks: dict[str, dict[str, SparseB]], partial: bool = False):
        super().__init__(path, manifest)
        self.tasks = tasks
        self._partial = partial  # tasks were left out, and writing would lose them

    @classmethod
    def open(cls, path: str | Path, tasks: Sequence[str] | None = None) -> Checkpoint:
        """Reads the manifest and the files of some tasks (all by default), and verifies every byte of them.

        The projection is verified when it is built: `projection_of`, or `verify_projection` for all modules.

        Raises:
            CheckpointError, CorruptCheckpoint: see `manifest.read`. Lists every damaged file.
            UnknownTask: a selected task does not exist.
        """
        path = Path(path)
        manifest, problems, partial = read_manifest(path, tasks)
        loaded, file_problems = task_file.read_all(path, manifest)
        if problems or file_problems:
            raise CorruptCheckpoint([*problems, *file_problems])
        return cls(path, manifest, loaded, partial)

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
        """Creates a checkpoint without tasks. Computes the digest of A.

        Args:
            modules: name → (d_out, d_in) of its weight.
            seed: of A.
            init_std: standard deviation of A; None: 1/√(3·d_in) of each module.

        Raises:
            CheckpointError: `path` already holds a checkpoint or cannot be written, or a value is invalid (a rank of 0,
                no modules, a standard deviation that is not positive). Nothing has been written then.
        """
        path = Path(path)
        if os.path.exists(path / manifests.FILE_NAME):
            raise CheckpointError(Problem("already holds a checkpoint", file=str(path), remedy="open it instead"))
        without_digests = Manifest(
            base_model=base_model,
            rank=rank,
            projection=Projection(projection.GENERATOR, seed, "", init_std),
            modules={name: Module(*shape, "") for name, shape in modules.items()},
        )
        _encoded(without_digests, path)  # refuses invalid values before A is computed
        digests = projection.digests(seed, rank, dict(modules), init_std)
        manifest = dataclasses.replace(
            without_digests,
            projection=dataclasses.replace(without_digests.projection, sha256=projection.combined_digest(digests)),
            modules={name: Module(*shape, digests[name]) for name, shape in modules.items()},
        )
        manifest, data = _encoded(manifest, path)
        try:
            make_durably(path / "tasks")
        except OSError as error:
            raise unwritable(path, error) from None
        write_durably(path / manifests.FILE_NAME, data)
        remove_leftovers(folders_of(path))
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
        statistics: bytes | None = None,
    ) -> Task:
        """Commits a finished task: first its files, then the manifest. Values are stored in their own dtype.

        Args:
            values: module → SparseB, for every target module.
            training: the task's provenance.
            statistics: content of its statistics file; None: it has none.

        Raises:
            CheckpointError: the name is taken or invalid, a mask overlaps another task's or does not have exactly
                K = ⌊(1 − s)·d_out·r⌋ positions, a value is not finite, a setting has no JSON form, or another process
                changed the folder. Nothing has been written then.
        """
        self._require_whole()
        file = str(self.path / f"tasks/{name}.safetensors")
        problem = name_problem(name, file=str(self.path))
        if name in self.manifest.task_names:
            problem = Problem(f"task {name!r} already exists", "name", str(self.path), "choose another name")
        elif name in self.manifest.sets:
            problem = Problem(f"{name!r} is the name of a named set", "name", str(self.path), "choose another name")
        if problem:
            raise CheckpointError(problem)
        if not 0 <= sparsity < 1:
            raise CheckpointError(Problem(f"{sparsity} is not in [0, 1)", "sparsity", file, _REMEDY))
        absent = [other for other in trained_with if other not in self.manifest.task_names]
        if absent:
            message, remedy = f"there is no task {', '.join(absent)}", "name tasks that the checkpoint has"
            raise CheckpointError(Problem(message, "trained_with", file, remedy))
        dtypes = {str(b.values.dtype).removeprefix("torch.") for b in values.values()}
        if len(dtypes) != 1 or not dtypes <= set(manifests.DTYPES):
            message = f"all values must have the same dtype, one of {', '.join(manifests.DTYPES)}"
            raise CheckpointError(Problem(message, "dtype", file, _REMEDY))
        task = Task(
            name=name,
            alpha=alpha,
            sparsity=sparsity,
            dtype=dtypes.pop(),
            file=StoredFile(f"tasks/{name}.safetensors", 0, ""),
            k={
                module: positions_per_matrix(sparsity, shape.d_out, self.manifest.rank)
                for module, shape in self.manifest.modules.items()
            },
            trained_with=tuple(trained_with),
            templates=templates,
            training=dict(training or {}),
        )
        tasks = self.tasks | {name: dict(values)}
        with_task = dataclasses.replace(self.manifest, tasks=(*self.manifest.tasks, task))
        problems = task_file.verify(self.path, with_task, tasks, _REMEDY)
        if problems:
            raise CheckpointError(problems)
        data = task_file.encode({module: values[module] for module in self.manifest.modules})
        files = {task.file.path: data}
        task = dataclasses.replace(task, file=_stored(task.file.path, data))
        if statistics is not None:
            task = dataclasses.replace(task, statistics=_stored(_statistics_path(name), statistics))
            files[_statistics_path(name)] = statistics
        self._commit(dataclasses.replace(self.manifest, tasks=(*self.manifest.tasks, task)), files)
        self.tasks = tasks
        return self.manifest.task(name)

    def set_scores(self, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
        """Replaces a task's scores in the manifest. The adapter digest does not change.

        Raises:
            UnknownTask: there is no such task.
            CheckpointError: a score has no JSON form (such as NaN), or another process changed the folder. Nothing has
                been written then.
        """
        self._commit(self._with_task(name, scores=tuple(dict(s) for s in scores)))

    def set_statistics(self, name: str, data: bytes | None) -> None:
        """Replaces a task's statistics; None removes them. The adapter digest does not change.

        If this is interrupted, the task has its old statistics, the new ones or none.

        Raises:
            UnknownTask: there is no such task.
            CheckpointError: they are larger than statistics can be, or another process changed the folder. Nothing has
                been written then.
        """
        self._require_whole()
        path = _statistics_path(name)
        without = self._with_task(name, statistics=None)
        stored = None if data is None else _stored(path, data)
        _encoded(self._with_task(name, statistics=stored), self.path)  # refuses before anything is written
        if self.manifest.task(name).statistics is not None:
            self._commit(without)
        if data is not None:
            self._commit(self._with_task(name, statistics=stored), {path: data})
        else:
            _delete(self.path / path)

    def statistics_bytes(self, name: str) -> bytes | None:
        """Returns the content of a task's statistics file, verified; None: it has none.

        Raises:
            UnknownTask: there is no such task.
            CorruptCheckpoint: the file is missing, cannot be read or was changed.
        """
        stored = self.manifest.task(name).statistics
        if stored is None:
            return None
        file = self.path / stored.path
        remedy = "restore the file from a copy, or gather the statistics again with `loraf-train protect`"
        try:
            data = read_bounded(file, stored.bytes)
        except OSError as error:
            message = f"cannot be read ({error.strerror or error})"
            raise CorruptCheckpoint(Problem(message, file=str(file), remedy=remedy)) from None
        if _stored(stored.path, data) != stored:
            message = f"was changed after it had been written ({len(data)} bytes, {stored.bytes} expected)"
            if len(data) == stored.bytes:
                message = "was changed after it had been written (its SHA-256 differs)"
            raise CorruptCheckpoint(Problem(message, file=str(file), remedy=remedy))
        return data

    def verify_statistics(self) -> None:
        """Checks every statistics file. Raises CorruptCheckpoint, which lists all damaged ones."""
        problems: list[Problem] = []
        for name in self.manifest.task_names:
            try:
                self.statistics_bytes(name)
            except CorruptCheckpoint as error:
                problems += error.problems
        if problems:
            raise CorruptCheckpoint(problems)

    def set_named_set(self, name: str, weights: Mapping[str, float]) -> None:
        """Adds or replaces a named set. The adapter digest does not change.

        Args:
            weights: task → weight.

        Raises:
            CheckpointError: the name is taken by a task or invalid, there is no such task, a weight is out of range,
                or another process changed the folder. Nothing has been written then.
        """
        order = {task: i for i, task in enumerate(self.manifest.task_names)}
        ordered = {task: float(weights[task]) for task in sorted(weights, key=lambda task: order.get(task, len(order)))}
        self._commit(dataclasses.replace(self.manifest, sets=self.manifest.sets | {name: ordered}))

    @staticmethod
    def remove_task(path: str | Path, name: str) -> Manifest:
        """Removes a task from the checkpoint in `path`, first from the manifest, then its files. Frees its positions.

        Only the manifest is read, so that a damaged task can be removed too. Tasks that were trained on top of it keep
        their values and its name in `trained_with`, so they can no longer be served as trained. Scores of sets with the
        task, and named sets with it, are removed. Files left behind by an interrupted removal are removed without an
        error.

        Returns:
            The new manifest.

        Raises:
            UnknownTask: there is no such task.
            CheckpointError: the folder holds no checkpoint, or it cannot be written.
        """
        path = Path(path)
        manifest = manifests.read(path)
        files = [path / _statistics_path(name), path / f"tasks/{name}.safetensors"]
        if name in manifest.task_names or name_problem(name) or not any(file.exists() for file in files):
            manifest.task(name)  # raises if there is no such task

            def without(task: Task) -> Task:
                sets = ({part.partition(":")[0] for part in str(score.get("set")).split("+")} for score in task.scores)
                kept = tuple(s for s, names in zip(task.scores, sets, strict=True) if name not in names)
                return dataclasses.replace(task, scores=kept)

            remaining = tuple(without(task) for task in manifest.tasks if task.name != name)
            sets = {label: weights for label, weights in manifest.sets.items() if name not in weights}
            manifest, data = _encoded(dataclasses.replace(manifest, tasks=remaining, sets=sets), path)
            write_durably(path / manifests.FILE_NAME, data)
        for file in files:
            _delete(file)
        remove_leftovers(folders_of(path))
        return manifest

    def _with_task(self, name: str, **changes: Any) -> Manifest:
        """Returns the manifest with fields of a task replaced. Raises UnknownTask."""
        changed = dataclasses.replace(self.manifest.task(name), **changes)
        tasks = tuple(changed if task.name == name else task for task in self.manifest.tasks)
        return dataclasses.replace(self.manifest, tasks=tasks)

    def _commit(self, manifest: Manifest, new_files: Mapping[str, bytes] | None = None) -> None:
        """Writes new files, then the manifest. Memory is updated once everything is on disk.

        Args:
            new_files: path in the checkpoint → content.
        """
        self._require_whole()
        manifest, data = _encoded(manifest, self.path)
        self._require_unchanged()
        for name, content in (new_files or {}).items():
            path = self.path / name
            try:
                make_durably(path.parent)
            except OSError as error:
                raise unwritable(path.parent, error) from error
            write_durably(path, content)
        write_durably(self.path / manifests.FILE_NAME, data)
        self.manifest = manifest
        remove_leftovers(folders_of(self.path))

    def _require_unchanged(self) -> None:
        """Refuses to overwrite what another process wrote, whose tasks would be lost."""
        if manifests.read(self.path).to_json() != self.manifest.to_json():
            message = "was changed by another process since it was read"
            remedy = "open the checkpoint again, and let only one process at a time write to it"
            raise CheckpointError(Problem(message, file=str(self.path / manifests.FILE_NAME), remedy=remedy))

    def _require_whole(self) -> None:
        if self._partial:
            message = "only some of its tasks were read, so it cannot be written"
            raise CheckpointError(Problem(message, file=str(self.path), remedy="open it with all tasks"))

    @property
    def nbytes(self) -> int:
        """Bytes of the tasks' coordinates and values in memory."""
        return sum(b.nbytes for modules in self.tasks.values() for b in modules.values())


def folders_of(path: Path) -> tuple[Path, ...]:
    """Returns the folders of a checkpoint that hold its files."""
    return path, path / "tasks", path / "statistics"


def _statistics_path(task: str) -> str:
    return f"statistics/{task}.safetensors"


def _stored(path: str, data: bytes) -> StoredFile:
    return StoredFile(path, len(data), hashlib.sha256(data).hexdigest())


def _delete(file: Path) -> None:
    """Deletes a file of the checkpoint that may be missing. Raises CheckpointError."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(file, error) from error


def _encoded(manifest: Manifest, path: Path) -> tuple[Manifest, bytes]:
    """Returns the manifest as it will be read back, and the bytes to write.

    Raises:
        CheckpointError: the manifest is inconsistent or has no JSON form.
    """
    file = path / manifests.FILE_NAME
    problems: list[Problem] = []
    with contextlib.suppress(TypeError, AttributeError):  # a value of another type, which `parse` will name
        manifests.inconsistencies(
            manifest, lambda where, text: problems.append(Problem(text, where, str(file), _REMEDY))
        )
    try:
        if not problems:
            data = manifest.to_json().encode()
            return manifests.parse(data, file), data
    except CorruptCheckpoint as error:
        problems += (dataclasses.replace(problem, remedy=_REMEDY) for problem in error.problems)
    except (TypeError, ValueError) as error:
        problems.append(Problem(f"cannot be written ({error})", "", str(file), _REMEDY))
    raise CheckpointError(problems)


def unwritable(target: Path, error: OSError) -> CheckpointError:
    """Returns the error to raise where the operating system refused to write."""
    remedy = "free disk space or choose a writable folder, then run the same command again"
    return CheckpointError(Problem(f"cannot be written ({error.strerror or error})", file=str(target), remedy=remedy))


def write_durably(target: Path, data: bytes) -> None:
    """Writes a temporary file, flushes it to disk and renames it, so that readers see the old or the new content.

    Raises:
        CheckpointError: the operating system refused (disk full, no permission).
    """
    temporary = temporary_name(target)
    try:
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
