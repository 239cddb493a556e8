"""Reading and writing a checkpoint folder.

    loraf.json                   the manifest (loraf.manifest)
    tasks/<name>.safetensors     per module: <module>.rows, <module>.cols, <module>.values

loraf.task_file reads and verifies; here is what a checkpoint is, and how it is written. A save writes new files beside
the old ones, flushes them, and replaces the manifest last, so that a checkpoint is at any moment the one before or the
one after. A finished task's file is never written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraf import manifest as manifests
from loraf import projection, task_file
from loraf.described import Described, chosen
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem
from loraf.manifest import BaseModel, Manifest, Module, Projection, StoredFile, Task, Templates, positions
from loraf.sparse import SparseB
from loraf.tasksets import name_problem

_MEND = "give values that the checkpoint can hold"
_PLAIN_TEMPLATES = Templates()


class Checkpoint(Described):
    """A checkpoint whose chosen tasks are in memory and verified.

    Attributes:
        tasks: task → module → SparseB.
    """

    def __init__(self, path: Path, manifest: Manifest, tasks: dict[str, dict[str, SparseB]], partial: bool = False):
        super().__init__(path, manifest)
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
        manifest, problems, partial = chosen(path, tasks)
        loaded, wrong = task_file.read_all(path, manifest)
        if problems or wrong:
            raise CorruptCheckpoint([*problems, *wrong])
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
            raise unwritable(path, error) from None
        write_durably(path / manifests.FILE_NAME, data)
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
        with_task = dataclasses.replace(self.manifest, tasks=(*self.manifest.tasks, task))
        problems = task_file.verify(self.path, with_task, tasks, _MEND)
        if problems:
            raise CheckpointError(problems)
        data = task_file.encode({module: values[module] for module in self.manifest.modules})
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

    @staticmethod
    def remove_task(path: str | Path, name: str) -> Manifest:
        """Takes a task out of the checkpoint in `path`: the manifest first, then its file. Its positions are free then.

        Only the manifest is read, so a damaged task can be taken out too. Tasks that were trained on top of it keep
        their values and name it in `trained_with`, so they can no longer be served as trained. Scores of a set with the
        task go with it, since the set is no more. A file that a killed removal left is removed without more ado.

        Returns:
            What is left.

        Raises:
            UnknownTask: there is no such task.
            CheckpointError: the folder holds no checkpoint, or it cannot be written.
        """
        path = Path(path)
        manifest = manifests.read(path)
        file = path / f"tasks/{name}.safetensors"
        if name in manifest.task_names or name_problem(name) or not file.exists():
            manifest.task(name)  # raises if there is none

            def without(task: Task) -> Task:
                sets = ({part.partition(":")[0] for part in str(score.get("set")).split("+")} for score in task.scores)
                kept = tuple(s for s, names in zip(task.scores, sets, strict=True) if name not in names)
                return dataclasses.replace(task, scores=kept)

            left = tuple(without(task) for task in manifest.tasks if task.name != name)
            manifest, data = _encoded(dataclasses.replace(manifest, tasks=left), path)
            write_durably(path / manifests.FILE_NAME, data)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(file, error) from error
        return manifest

    def _commit(self, tasks: tuple[Task, ...], new_files: Mapping[Path, bytes] | None = None) -> None:
        """Writes new files, then the manifest with `tasks`; what is in memory changes only when all is on disk."""
        self._require_whole()
        manifest, data = _encoded(dataclasses.replace(self.manifest, tasks=tasks), self.path)
        self._require_unchanged()
        for path, content in (new_files or {}).items():
            write_durably(path, content)
        write_durably(self.path / manifests.FILE_NAME, data)
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

    @property
    def nbytes(self) -> int:
        """Bytes of the tasks' coordinates and values in memory."""
        return sum(b.nbytes for modules in self.tasks.values() for b in modules.values())


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


def unwritable(target: Path, error: OSError) -> CheckpointError:
    """What to tell the user where the operating system refused."""
    remedy = "make room on the disk, or name a folder that may be written; then run the same command again"
    return CheckpointError(Problem(f"cannot be written ({error.strerror or error})", file=str(target), remedy=remedy))


def write_durably(target: Path, data: bytes) -> None:
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
        raise unwritable(target, error) from error
