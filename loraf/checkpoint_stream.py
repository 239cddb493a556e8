"""Streams a checkpoint module by module without holding it in memory.

`Checkpoint.open` holds all tasks in memory. A stream only holds the modules in use, and reuses their memory for the
next ones. A file's SHA-256 is known only at its end, so nothing derived from the data may be used before `finish` has
returned. The data is checked before it is handed out, so code that relies on sorted, in-range positions is safe.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from loraf import task_file
from loraf.checkpoint import Checkpoint
from loraf.errors import CorruptCheckpoint, Problem
from loraf.files import strict_safetensors
from loraf.files.bounded_file import open_regular
from loraf.files.strict_safetensors import Entry
from loraf.manifest import Manifest, Task
from loraf.manifest_view import CheckpointManifestView, read_manifest
from loraf.matrices.sparse import SparseB
from loraf.system import pages
from loraf.task_file import BYTES_AT_ONCE, PARTS

_UNIT = 64  # bytes; tensors of a file begin at multiples of it in memory


class _Unsound(Exception):
    """A file is damaged. `Checkpoint.open` then finds out how."""


class CheckpointStream(CheckpointManifestView):
    """A checkpoint that is read forwards.

    Several threads may read modules at once. Reading modules in the order of the manifest takes the least memory, for
    files written by this release.
    """

    def __init__(self, path: Path, manifest: Manifest):
        super().__init__(path, manifest)
        self._files: list[_File] = []  # opened by the first read, so that A can be built before
        self._reading = threading.Lock()
        self._free_buffers: list[torch.Tensor] = []
        self._unread = dict.fromkeys(manifest.modules)

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, tasks: Sequence[str] | None = None) -> Iterator[CheckpointStream]:
        """Opens a checkpoint, restricted to some tasks (all by default). Files are closed when the context ends.

        Raises:
            CheckpointError, CorruptCheckpoint, UnknownTask: the manifest is invalid, see `Checkpoint.open`.
        """
        path = Path(path)
        manifest, problems, _ = read_manifest(path, tasks)
        stream = cls(path, manifest)
        try:
            with stream._reporting_all():
                if problems:
                    raise _Unsound
            yield stream
        finally:
            for file in stream._files:
                file.close()

    @contextmanager
    def read_modules(self, modules: Sequence[str]) -> Iterator[dict[str, dict[str, SparseB]]]:
        """Reads some modules of all tasks. Each module can be read once.

        Yields:
            Task → module → SparseB, valid within the context. Their memory is reused afterwards.

        Raises:
            CorruptCheckpoint: this data is damaged. Lists all that is wrong with the checkpoint.
        """
        with self._reporting_all(), self._reading:
            for module in modules:
                del self._unread[module]
            self._open_files()
            names = [f"{module}.{part}" for module in modules for part in PARTS]
            size = sum(file.size_of(names) for file in self._files)
            buffer = self._free_buffers.pop() if self._free_buffers else pages(0)
            if len(buffer) < size:
                buffer = pages(size)
            memory = strict_safetensors.bytes_of(buffer)
            tasks: dict[str, dict[str, SparseB]] = {}
            for file in self._files:
                tensors, memory = file.take(names, memory)
                tasks[file.task.name] = {
                    module: task_file.matrix_of(tensors, module, self._shape(module)) for module in modules
                }
        with self._reporting_all():
            for module in modules:
                faults, shared = task_file.examine_module(self.manifest, tasks, module)
                if faults or shared:
                    raise _Unsound
        try:
            yield tasks
        finally:
            with self._reading:
                self._free_buffers.append(buffer)

    def finish(self) -> None:
        """Reads the remaining modules and checks the digest of every file.

        Raises:
            CorruptCheckpoint: lists all that is wrong with the checkpoint.
        """
        for module in list(self._unread):
            with self.read_modules([module]):
                pass
        with self._reporting_all(), self._reading:
            self._open_files()
            for file in self._files:
                file.finish()

    def _open_files(self) -> None:
        for task in self.manifest.tasks[len(self._files) :]:
            self._files.append(_File(self.path / task.file.path, task))

    def _shape(self, module: str) -> tuple[int, int]:
        return self.manifest.modules[module].d_out, self.manifest.rank

    @contextmanager
    def _reporting_all(self) -> Iterator[None]:
        """Turns the first sign of damage into a list of all that is wrong. Raises CorruptCheckpoint."""
        try:
            yield
        except (_Unsound, OSError, ValueError) as error:
            Checkpoint.open(self.path, self.manifest.task_names)
            message = "was changed while it was read"
            if isinstance(error, OSError):
                message = f"cannot be read ({error.strerror})"
            remedy = "read it again once nothing writes to it"
            raise CorruptCheckpoint(Problem(message, file=str(self.path), remedy=remedy)) from None


class _File:
    """One task's file, read forwards."""

    def __init__(self, path: Path, task: Task):
        self.task = task
        self._stream = open_regular(path)
        try:
            self._sha = hashlib.sha256()
            if os.fstat(self._stream.fileno()).st_size != task.file.bytes:
                raise _Unsound
            beginning = self._read(memoryview(bytearray(min(8, task.file.bytes))))
            end = strict_safetensors.header_end(beginning, task.file.bytes, task_file.longest_header(task))
            header = self._read(memoryview(bytearray(end - 8)))
            entries = strict_safetensors.parse_header(header, task.file.bytes - end)
            if {entry.name for entry in entries} != task_file.tensor_names(task):
                raise _Unsound
        except BaseException:
            self.close()
            raise
        self._entries = {entry.name: entry for entry in entries}
        self._ahead = deque(entries)
        self._passed: dict[str, torch.Tensor] = {}  # read on the way to another tensor

    def size_of(self, names: Sequence[str]) -> int:
        """Returns the bytes that `take` needs at most."""
        entries = map(self._entries.__getitem__, names)
        return sum(entry.last - entry.first + 2 * _UNIT for entry in entries)  # each may be read in a run of its own

    def take(self, names: Sequence[str], memory: memoryview) -> tuple[dict[str, torch.Tensor], memoryview]:
        """Reads some tensors into `memory` (aligned), except those that were passed before.

        Returns:
            The tensors, and the unused end of `memory`.
        """
        tensors = {name: self._passed.pop(name) for name in names if name in self._passed}
        missing = set(names) - tensors.keys()
        while missing:
            if not self._ahead:  # another thread's reading failed
                raise _Unsound
            run = []  # adjacent tensors are read at once
            while self._ahead and self._ahead[0].name in missing:
                run.append(self._ahead.popleft())
                missing.remove(run[-1].name)
            if run:
                begin = run[0].first - run[0].first % _UNIT  # tensors are aligned as they are in the file
                self._read(memory[run[0].first - begin : run[-1].last - begin])
                tensors |= {entry.name: _tensor(memory, entry, begin) for entry in run}
                memory = memory[-(-(run[-1].last - begin) // _UNIT) * _UNIT :]
            else:
                entry = self._ahead.popleft()
                place = strict_safetensors.bytes_of(pages(entry.last - entry.first))
                self._read(place)
                self._passed[entry.name] = _tensor(place, entry, entry.first)
        return tensors, memory

    def finish(self) -> None:
        """Raises _Unsound unless the whole file was read and has the digest that the manifest states."""
        if self._ahead or self._stream.read(1) or self._sha.hexdigest() != self.task.file.sha256:
            raise _Unsound

    def close(self) -> None:
        self._stream.close()

    def _read(self, place: memoryview) -> memoryview:
        """Fills `place` with the next bytes of the file, and returns it."""
        at = 0
        while at < len(place):
            count = self._stream.readinto(place[at : at + BYTES_AT_ONCE])
            if not count:
                raise _Unsound
            self._sha.update(place[at : at + count])
            at += count
        return place


def _tensor(memory: memoryview, entry: Entry, begin: int) -> torch.Tensor:
    """Returns the tensor of `entry` in `memory`, which begins with byte `begin` of the file's tensors."""
    return strict_safetensors.tensor_at(memory, entry.first - begin, entry.last - begin, entry.dtype, entry.shape)
