"""A checkpoint on disk before and after its values are read.

    CheckpointFolder.read ─▶ manifest ─▶ require_servable (base model, files) ─▶ served_as ─▶ read_values ─▶ every byte

The first three steps read no task file. `read_values` reads and hashes each task file once, in the process that keeps
the values; a backend with `reads_checkpoints` does the same in its own processes instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loraf.base_model import require_same_base
from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, ConfigError, CorruptCheckpoint, Problem
from loraf.manifest import BaseModel, Manifest, StoredFile
from loraf.manifest_view import read_manifest
from loraf.task_file import RESTORE
from loraf_serve.adapters.model_shapes import misfits
from loraf_serve.backends.backend import ServedAdapter


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint of which only the manifest has been read.

    Attributes:
        tasks: the selected tasks; None for all.
        manifest: restricted to the selected tasks.
    """

    path: Path
    tasks: tuple[str, ...] | None
    manifest: Manifest

    @classmethod
    def read(cls, path: Path, tasks: tuple[str, ...] | None = None) -> CheckpointFolder:
        """Reads and checks `loraf.json`.

        Args:
            tasks: the tasks to select; None for all.

        Raises:
            CheckpointError, CorruptCheckpoint: there is no manifest, or it is damaged or of an unknown format.
            UnknownTask: the checkpoint does not have a selected task.
        """
        manifest, problems, _ = read_manifest(path, tasks)
        if problems:
            raise CorruptCheckpoint(problems)
        return cls(path, tasks, manifest)

    def require_servable(
        self, model_folder: Path, allow_other_base: bool = False, model: BaseModel | None = None
    ) -> None:
        """Checks everything that can be checked without reading a task file.

        Args:
            model_folder: the served model.
            model: the result of `loraf.base_model.describe` for it; None to compute it here.

        Raises:
            ConfigError: the checkpoint has no task.
            BaseMismatch: it was trained for another base model, and `allow_other_base` is not set; or a module has
                another shape in the model.
            CorruptCheckpoint: task files are missing or have another size than the manifest states.
        """
        if not self.manifest.tasks:
            remedy = "serve a checkpoint in which at least one task has been trained"
            raise ConfigError(Problem("holds no task", file=str(self.path), remedy=remedy))
        if not allow_other_base:
            require_same_base(self.manifest.base_model, model_folder, self.path, model)
        unfit = misfits(self.manifest, model_folder, str(self.path))
        if unfit:
            raise BaseMismatch(unfit)
        problems = [problem for task in self.manifest.tasks if (problem := self._file_problem(task.file))]
        if problems:
            raise CorruptCheckpoint(problems)

    def _file_problem(self, stored: StoredFile) -> Problem | None:
        file = self.path / stored.path
        try:
            size = file.stat().st_size
        except OSError as error:
            return Problem(f"cannot be read ({error.strerror})", file=str(file), remedy=RESTORE)
        if size == stored.bytes:
            return None
        message = f"is not the file that the manifest names ({size} bytes, {stored.bytes} expected)"
        return Problem(message, file=str(file), remedy=RESTORE)

    def served_as(self, name: str) -> ServedAdapter:
        """The adapter under a name, without values."""
        return ServedAdapter(name, self.path, self.manifest)


def read_values(adapter: ServedAdapter) -> ServedAdapter:
    """Reads an adapter's task files, each once, and verifies every byte of them and A of every module.

    Returns:
        The same adapter with its values.

    Raises:
        CorruptCheckpoint: files are damaged (all of them are named), or the checkpoint has changed since its manifest
            was read.
    """
    checkpoint = Checkpoint.open(adapter.path, adapter.tasks)
    if checkpoint.manifest.adapter_digest != adapter.digest:
        message = f"was changed while it was being loaded (adapter digest {checkpoint.manifest.adapter_digest})"
        remedy = "load it again once nothing writes to it"
        raise CorruptCheckpoint(Problem(message, file=str(adapter.path), remedy=remedy))
    checkpoint.verify_projection()
    return replace(adapter, manifest=checkpoint.manifest, checkpoint=checkpoint)
