"""Checkpoints that clients may load: those below `--adapter-root`, and nothing else of this machine.

A client learns nothing about files elsewhere, not even whether they exist. Anyone who can write below the root decides
what can be served, so make it writable only for trusted users.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from loraf.base_model import describe
from loraf.errors import BaseMismatch, ConfigError, LorafError, Problem, UnknownTask
from loraf.manifest import FILE_NAME, BaseModel
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder, read_values
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest
from loraf_serve.limits import MAX_PATH

_REMEDY = "name a checkpoint's folder by its path below --adapter-root"


class AdapterRoot:
    """The folder of checkpoints that clients may load.

    Args:
        folder: `--adapter-root`.
        model_folder: the served model.
        allow_other_base: accept checkpoints of another base model.

    Raises:
        ConfigError: `folder` is not a folder.
    """

    def __init__(self, folder: Path, model_folder: Path, allow_other_base: bool = False):
        if not os.path.isdir(folder):
            remedy = "name the folder that holds the checkpoints"
            raise ConfigError(Problem("is not a folder", "--adapter-root", str(folder), remedy))
        self._folder = Path(os.path.realpath(folder))
        self._model_folder = Path(model_folder)
        self._allow_other_base = allow_other_base

    def relative(self, path: str) -> str:
        """An absolute path below the root, relative to it; any other path as it is. Does not look at the disk."""
        below = Path(path)
        inside = below.is_absolute() and self._folder in below.parents
        return str(below.relative_to(self._folder)) if inside else path

    def find(self, path: str, tasks: Sequence[str]) -> CheckpointFolder:
        """Reads the manifest of a checkpoint, and checks that all its files lie below the root.

        Args:
            path: as the client wrote it.
            tasks: the tasks to select; empty for all.

        Raises:
            InvalidRequest: there is no such folder below the root, or a file of it lies elsewhere.
            UnknownTask: the checkpoint has no such task.
            CheckpointError, CorruptCheckpoint: as `CheckpointFolder.read`.
        """
        problem = path_problem(path)
        if problem:
            raise InvalidRequest(problem)
        folder = self._inside(self._folder / path)
        if not os.path.isdir(folder):
            raise _refusal("there is no such folder below --adapter-root")
        self._require_inside(folder, FILE_NAME)
        try:
            checkpoint = CheckpointFolder.read(folder, tuple(tasks) or None)
        except UnknownTask as error:
            raise UnknownTask(replace(p, field=p.field.removesuffix(".name")) for p in error.problems) from None
        for task in checkpoint.manifest.tasks:
            self._require_inside(folder, task.file.path)
        return checkpoint

    def open(self, name: str, checkpoint: CheckpointFolder, manifest_only: bool = False) -> ServedAdapter:
        """Checks a checkpoint that `find` returned, and reads its values.

        Args:
            manifest_only: do not read the values: the backend will.

        Raises:
            LorafError: as `CheckpointFolder.require_servable` and `read_values`.
        """
        model = None if self._allow_other_base else self._model
        adapter = checkpoint.served_as(name)
        try:
            checkpoint.require_servable(self._model_folder, self._allow_other_base, model)
        except BaseMismatch as error:  # names the base model by the folder in which it was trained
            trained, shown = checkpoint.manifest.base_model.name, adapter.base_name
            raise BaseMismatch(
                replace(p, message=p.message.replace(trained, shown), remedy=p.remedy.replace(trained, shown))
                for p in error.problems
            ) from None
        return adapter if manifest_only else read_values(adapter)

    @cached_property
    def _model(self) -> BaseModel:
        """Computed once: the engine has read the model, so later changes on disk mean nothing; and safetensors 0.8
        leaks some bytes of memory with every slice that it returns."""
        return describe(str(self._model_folder), self._model_folder)

    def shown(self, error: LorafError) -> LorafError:
        """The same error without the folders of this machine."""

        def without_folders(text: str) -> str:
            text = text.replace(f"{self._folder}{os.sep}", "").replace(str(self._folder), "--adapter-root")
            return text.replace(str(self._model_folder), "--model")

        return type(error)(
            replace(p, message=without_folders(p.message), file=without_folders(p.file)) for p in error.problems
        )

    def _inside(self, path: Path) -> Path:
        """The path with all links resolved. Raises InvalidRequest if that is not below the root."""
        real = Path(os.path.realpath(path))
        if self._folder not in real.parents:
            raise _refusal("leads out of --adapter-root")
        return real

    def _require_inside(self, folder: Path, file: str) -> None:
        """Checks that a file is a regular one below the root. A missing file passes: reading it reports that better."""
        real = self._inside(folder / file)
        try:
            regular = stat.S_ISREG(os.stat(real).st_mode)
        except OSError:
            return
        if not regular:  # reading a pipe would never end
            raise _refusal(f"{file} in it is not a regular file")


def path_problem(path: str) -> Problem | None:
    """The problem with a path that can be seen without looking at the disk, or None."""
    if len(path) > MAX_PATH:
        return Problem(f"has {len(path)} characters", "path", remedy=f"use at most {MAX_PATH}")
    parts = Path(path).parts
    if not parts:
        return Problem("names no folder", "path", remedy=_REMEDY)
    if Path(path).is_absolute() or ".." in parts or "\0" in path:
        return Problem("is absolute, contains '..', or contains a NUL character", "path", remedy=_REMEDY)
    return None


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(Problem(message, "path", remedy=_REMEDY))
