"""Checkpoints that clients may load: those below `--adapter-root`, and nothing else of this machine.

A client learns nothing of what lies elsewhere, not even whether it exists. Whoever may write below the root decides
what can be served; the root is to be writable only for those who are trusted with that.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from loraf import manifest as manifests
from loraf.base_model import describe
from loraf.errors import ConfigError, LorafError, Problem, UnknownTask
from loraf.manifest import BaseModel, Manifest
from loraf_serve.adapters.registry import open_folder, require_servable
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest

_REMEDY = "name a checkpoint's folder by its path below --adapter-root"


@dataclass(frozen=True)
class Found:
    """A checkpoint below the root of which only the manifest has been read.

    Attributes:
        manifest: restricted to the chosen tasks.
    """

    folder: Path
    tasks: tuple[str, ...] | None
    manifest: Manifest

    @property
    def file_bytes(self) -> int:
        """Of the chosen tasks' files: about what the tasks take in memory."""
        return sum(task.file.bytes for task in self.manifest.tasks)


class AdapterRoot:
    """
    Args:
        folder: `--adapter-root`.
        model_folder: the model that is served.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: Path, model_folder: Path, allow_other_base: bool = False):
        if not os.path.isdir(folder):
            remedy = "name the folder that holds the checkpoints"
            raise ConfigError(Problem("is no folder", "--adapter-root", str(folder), remedy))
        self._folder = Path(os.path.realpath(folder))
        self._model_folder = Path(model_folder)
        self._allow_other_base = allow_other_base

    def find(self, path: str, tasks: Sequence[str]) -> Found:
        """Reads the manifest, and looks where the files lie.

        Args:
            path: as the client wrote it.
            tasks: names of tasks; empty: all.

        Raises:
            InvalidRequest: there is no such folder below the root, or a file of it lies elsewhere.
            UnknownTask: the checkpoint has no such task.
            CheckpointError, CorruptCheckpoint: as `loraf.manifest.read`.
        """
        problem = path_problem(path)
        if problem:
            raise InvalidRequest(problem)
        folder = self._inside(self._folder / path)
        if not os.path.isdir(folder):
            raise _refusal("there is no such folder below --adapter-root")
        self._require_own_file(folder, manifests.FILE_NAME)
        manifest = manifests.read(folder)
        if tasks:
            try:
                manifest = manifest.only(tuple(tasks))
            except UnknownTask as error:
                raise UnknownTask(replace(p, field=p.field.removesuffix(".name")) for p in error.problems) from None
        for task in manifest.tasks:
            self._require_own_file(folder, task.file.path)
        return Found(folder, tuple(tasks) or None, manifest)

    def open(self, name: str, found: Found, manifest_alone: bool = False) -> ServedAdapter:
        """
        Args:
            manifest_alone: leave the values to whoever reads them.

        Raises:
            LorafError: as `loraf_serve.adapters.registry.open_folder`.
        """
        model = None if self._allow_other_base else self._model
        where = (self._model_folder, self._allow_other_base, model)
        if manifest_alone:
            require_servable(found.manifest, found.folder, *where)
            return ServedAdapter(name, found.folder, found.manifest)
        return open_folder(name, found.folder, found.tasks, *where)

    @cached_property
    def _model(self) -> BaseModel:
        """Looked at once: the engine has read it, so that a change on the disk means nothing; and safetensors 0.8 loses
        some bytes of memory at every slice that it gives."""
        return describe(str(self._model_folder), self._model_folder)

    def shown(self, error: LorafError) -> LorafError:
        """The same error without the folders of this machine."""

        def without(text: str) -> str:
            text = text.replace(f"{self._folder}{os.sep}", "").replace(str(self._folder), "--adapter-root")
            return text.replace(str(self._model_folder), "--model")

        return type(error)(replace(p, message=without(p.message), file=without(p.file)) for p in error.problems)

    def _inside(self, path: Path) -> Path:
        """Where the path leads, all links followed. Raises InvalidRequest: not below the root."""
        real = Path(os.path.realpath(path))
        if self._folder not in real.parents:
            raise _refusal("leads out of --adapter-root")
        return real

    def _require_own_file(self, folder: Path, file: str) -> None:
        """Lets a missing file pass: who reads it says so."""
        real = self._inside(folder / file)
        try:
            regular = stat.S_ISREG(os.stat(real).st_mode)
        except OSError:
            return
        if not regular:  # reading a pipe would never end
            raise _refusal(f"{file} in it is no file")


def path_problem(path: str) -> Problem | None:
    """What is wrong with a path whatever lies there, or None."""
    parts = Path(path).parts
    if not parts:
        return Problem("names no folder", "path", remedy=_REMEDY)
    if Path(path).is_absolute() or ".." in parts or "\0" in path:
        return Problem("is absolute, or holds '..' or a character that no path has", "path", remedy=_REMEDY)
    return None


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(Problem(message, "path", remedy=_REMEDY))
