"""A checkpoint read once from beginning to end, some modules at a time, by one who keeps none of it.

`Checkpoint.open` takes memory for all tasks; here it is that of the modules in hand, and it is used again for the next.
A file's SHA-256 is known at its end only: before `finish` has returned, nothing that was made of the masks may be used.
But masks are never handed out before they were looked through, so that code which relies on their order and their range
may walk over them.
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
from loraf.described import Described, chosen
from loraf.errors import CorruptCheckpoint, Problem
from loraf.manifest import Manifest, Task
from loraf.pages import pages
from loraf.sparse import SparseB
from loraf.task_file import BYTES_AT_ONCE, PARTS, Entry

_UNIT = 64  # bytes; where the tensors of a file begin in memory is a multiple of it


class _Unsound(Exception):
    """Something is wrong with a file; `Checkpoint.open` says what."""


class Stream(Described):
    """A checkpoint that is read. Several threads may ask for masks at once; modules that come in the order of the
    manifest take least memory, for a file written by this release."""

    def __init__(self, path: Path, manifest: Manifest):
        super().__init__(path, manifest)
        self._files: list[_File] = []  # opened when masks are first asked for: until then A may be made
        self._reading = threading.Lock()
        self._rooms: list[torch.Tensor] = []  # memory that nobody uses now
        self._unread = dict.fromkeys(manifest.modules)

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, tasks: Sequence[str] | None = None) -> Iterator[Stream]:
        """Of the chosen tasks (all by default). Files that were opened are closed at the end.

        Raises:
            CheckpointError, CorruptCheckpoint, UnknownTask: the manifest is none, as `Checkpoint.open`.
        """
        path = Path(path)
        manifest, problems, _ = chosen(path, tasks)
        stream = cls(path, manifest)
        try:
            with stream._sound():
                if problems:
                    raise _Unsound
            yield stream
        finally:
            for file in stream._files:
                file.close()

    @contextmanager
    def masks(self, modules: Sequence[str]) -> Iterator[dict[str, dict[str, SparseB]]]:
        """Task → module → SparseB, within the context: afterwards their memory holds others. Once for each module.

        Raises:
            CorruptCheckpoint: all that is wrong with the checkpoint, if anything is with these masks.
        """
        with self._sound(), self._reading:
            for module in modules:
                del self._unread[module]
            self._open()
            names = [f"{module}.{part}" for module in modules for part in PARTS]
            size = sum(file.size_of(names) for file in self._files)
            room = self._rooms.pop() if self._rooms else pages(0)
            if len(room) < size:
                room = pages(size)
            memory, found = task_file.bytes_of(room), {}
            for file in self._files:
                tensors, memory = file.take(names, memory)
                found[file.task.name] = {
                    module: SparseB(*(tensors[f"{module}.{part}"] for part in PARTS), self._shape(module))
                    for module in modules
                }
        with self._sound():
            for module in modules:
                faults, shared = task_file.examine_module(self.manifest, found, module)
                if faults or shared:
                    raise _Unsound
        try:
            yield found
        finally:
            with self._reading:
                self._rooms.append(room)

    def finish(self) -> None:
        """Reads what nobody asked for; all that was read is the checkpoint's if it returns.

        Raises:
            CorruptCheckpoint: all that is wrong with it.
        """
        for module in list(self._unread):
            with self.masks([module]):
                pass
        with self._sound(), self._reading:
            self._open()
            for file in self._files:
                file.finish()

    def _open(self) -> None:
        for task in self.manifest.tasks[len(self._files) :]:
            self._files.append(_File(self.path / task.file.path, task))

    def _shape(self, module: str) -> tuple[int, int]:
        return self.manifest.modules[module].d_out, self.manifest.rank

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Turns what is found by the way into all that is wrong. Raises CorruptCheckpoint."""
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
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115 closed by `close`
        try:
            self._sha = hashlib.sha256()
            if os.fstat(self._stream.fileno()).st_size != task.file.bytes:
                raise _Unsound
            beginning = self._read(memoryview(bytearray(min(8, task.file.bytes))))
            end = task_file.header_end(beginning, task.file.bytes)
            header = self._read(memoryview(bytearray(end - 8)))
            entries = task_file.parse_header(header, task.file.bytes - end)
            if {entry.name for entry in entries} != task_file.tensor_names(task):
                raise _Unsound
        except BaseException:
            self.close()
            raise
        self._entries = {entry.name: entry for entry in entries}
        self._ahead = deque(entries)
        self._passed: dict[str, torch.Tensor] = {}  # read on the way to another

    def size_of(self, names: Sequence[str]) -> int:
        """Bytes that `take` needs at most."""
        found = map(self._entries.__getitem__, names)
        return sum(entry.last - entry.first + 2 * _UNIT for entry in found)  # it may be a run of its own

    def take(self, names: Sequence[str], memory: memoryview) -> tuple[dict[str, torch.Tensor], memoryview]:
        """Some tensors, in `memory` (aligned) unless they were passed before; and what is left of it."""
        found = {name: self._passed.pop(name) for name in names if name in self._passed}
        wanted = set(names) - found.keys()
        while wanted:
            if not self._ahead:  # another thread's reading failed
                raise _Unsound
            run = []  # what lies side by side is read at once
            while self._ahead and self._ahead[0].name in wanted:
                run.append(self._ahead.popleft())
                wanted.remove(run[-1].name)
            if run:
                begin = run[0].first - run[0].first % _UNIT  # every tensor at a place like its own in the file
                self._read(memory[run[0].first - begin : run[-1].last - begin])
                found |= {entry.name: _tensor(memory, entry, begin) for entry in run}
                memory = memory[-(-(run[-1].last - begin) // _UNIT) * _UNIT :]
            else:
                entry = self._ahead.popleft()
                place = task_file.bytes_of(pages(entry.last - entry.first))
                self._read(place)
                self._passed[entry.name] = _tensor(place, entry, entry.first)
        return found, memory

    def finish(self) -> None:
        if self._ahead or self._stream.read(1) or self._sha.hexdigest() != self.task.file.sha256:
            raise _Unsound

    def close(self) -> None:
        self._stream.close()

    def _read(self, place: memoryview) -> memoryview:
        at = 0
        while at < len(place):
            count = self._stream.readinto(place[at : at + BYTES_AT_ONCE])
            if not count:
                raise _Unsound
            self._sha.update(place[at : at + count])
            at += count
        return place


def _tensor(memory: memoryview, entry: Entry, begin: int) -> torch.Tensor:
    """The tensor that lies in `memory`, whose first byte is number `begin` of the file."""
    return task_file.tensor(memory, entry.first - begin, entry.last - begin, entry.dtype, entry.shape)
