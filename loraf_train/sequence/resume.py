"""What is kept of the task that is being trained, so that a run that was killed goes on where it was.

    <output>/.resume/state-<n>.json          task, what its values depend on, phase, step; digests of both files
    <output>/.resume/state-<n>.safetensors   positions once they are chosen; parameters and optimizer state

The folder is no part of the checkpoint: nothing but `loraf-train run` reads it, and it is gone when the task is in the
checkpoint. The state before stays until the next one is on disk, and is the one to go on from if the last is damaged.
A state is used only if everything that decides the task's values is what it was: settings, examples, base model,
earlier tasks, precision and versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from loraf import strict_json, task_file
from loraf.checkpoint import unwritable, write_durably
from loraf.errors import CheckpointError, Problem
from loraf.manifest import StoredFile
from loraf_train.processes import group
from loraf_train.sealed import seal, unseal
from loraf_train.sequence.provenance import differences, said
from loraf_train.trainer import loop

if TYPE_CHECKING:
    from loraf_train.data.examples import Example

FOLDER = ".resume"
CALIBRATION, TRAINING = "calibration", "training"
_SEAL = "loraf-resume", 1
_STATE = re.compile(r"state-(\d+)\.json")
_OURS = re.compile(r"\.?state-(\d+)\.(json|safetensors)(\.\d+\.tmp)?")
_TEMPORARY = re.compile(r"\.(?:loraf\.json|.+\.safetensors)\.(\d+)\.tmp")  # of loraf.checkpoint.write_durably
_MASK = "mask."


@dataclass(frozen=True)
class State:
    """How far a task is.

    Attributes:
        masks: module → (K,) int64 flat positions, ascending; None: calibration is not over.
        snapshot: of the phase it is in; None: at its beginning.
    """

    masks: dict[str, torch.Tensor] | None
    snapshot: loop.Snapshot | None

    @property
    def phase(self) -> str:
        return CALIBRATION if self.masks is None else TRAINING

    def __str__(self) -> str:
        if self.snapshot is None:
            return CALIBRATION
        return f"{self.phase} step {self.snapshot.step} of {self.snapshot.steps}"


@dataclass(frozen=True)
class _Record:
    """The content of a state's JSON file, beside format, version and its own digest.

    Attributes:
        making: all that the task's values depend on.
        where: how and where it was done, on which only their last bits depend.
        step, steps: of the phase; both 0 at its beginning.
    """

    task: str
    making: dict[str, Any]
    where: dict[str, Any]
    step: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    tensors: StoredFile


class Keeper:
    """Keeps one task's state while it is trained. Every process has one; only the first writes.

    Attributes:
        state: where to go on; None: at the beginning.
        notes: what there is to say of states that were found.

    Args:
        output: the checkpoint's folder.
        making: all that the task's values depend on, as plain JSON: `settings`, and whatever else in one word each.
        where: how and where it is done, on which only their last bits depend, as plain JSON.
        seconds: time between two saves within a phase.
        device: what this process computes on.

    Raises:
        CheckpointError: the processes do not find the same state.
    """

    def __init__(
        self,
        output: Path,
        task: str,
        making: Mapping[str, Any],
        where: Mapping[str, Any],
        seconds: float,
        device: torch.device,
    ):
        self._folder = output / FOLDER
        self._task = task
        self._making, self._where = strict_json.plain(making), strict_json.plain(where)
        self._seconds = seconds
        self._latest: int | None = None  # number of the state on disk to go on from
        self.state: State | None = None
        self.notes: list[str] = []
        digest = self._find()
        self._masks = self.state.masks if self.state else None
        if not group.agree(int(digest[:15], 16), device):
            message = "the processes of this run do not find the same state of the task"
            remedy = "give all of them the same folder; or delete it, and the task starts anew"
            raise CheckpointError(Problem(message, file=str(self._folder), remedy=remedy))
        self._saved = time.monotonic()

    def _find(self) -> str:
        """Sets `state` and `notes`; returns the digest (hex) of what is found."""
        for number in sorted(_numbers(self._folder), reverse=True):
            file = self._folder / f"state-{number}.json"
            try:
                record, digest = _read(file)
                refusal = self._refusal(record)
                state = None if refusal else _state(self._folder, record)
            except (OSError, ValueError) as error:
                self.notes.append(f"{file} is of no use ({error})")
                continue
            if state is not None:
                self.state, self._latest = state, number
                elsewhere = _changes(record.where, self._where)
                if elsewhere:
                    self.notes.append(f"it goes on in another way, so the last bits may differ: {elsewhere}")
                return digest
            if refusal not in self.notes:
                self.notes.append(refusal)
        return "0" * 64

    def _refusal(self, record: _Record) -> str:
        """Why a state is not to be used; empty if it is."""
        if record.task != self._task:
            return f"what the interrupted training of task {record.task!r} left is given up"
        changes = _changes(record.making, self._making)
        return f"what the interrupted training left cannot be used: {changes}" if changes else ""

    def journal(self, phase: str) -> loop.Journal:
        """What `loop.fit` needs to go on with this phase, and to have it kept."""
        return _Journal(self, phase)

    def chosen(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Calibration is over. Raises CheckpointError where the disk refuses."""
        self._masks = dict(masks)
        self.keep(None)

    def is_due(self) -> bool:
        return group.is_first() and time.monotonic() - self._saved >= self._seconds

    def keep(self, snapshot: loop.Snapshot | None) -> None:
        """Writes a state; the ones before the last go. Raises CheckpointError where the disk refuses."""
        if not group.is_first():
            return
        try:
            number = max(_numbers(self._folder, any_file=True), default=0) + 1
            _remove(self._folder, keep=self._latest)  # first, for the room
            _make_durably(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        content = {f"{_MASK}{module}": flat.to(torch.int32) for module, flat in (self._masks or {}).items()}
        data = safetensors.torch.save(content | (snapshot.tensors if snapshot else {}))
        record = _Record(
            task=self._task,
            making=self._making,
            where=self._where,
            step=snapshot.step if snapshot else 0,
            steps=snapshot.steps if snapshot else 0,
            first_loss=snapshot.first_loss if snapshot else None,
            last_loss=snapshot.last_loss if snapshot else None,
            tensors=StoredFile(f"state-{number}.safetensors", len(data), hashlib.sha256(data).hexdigest()),
        )
        write_durably(self._folder / record.tensors.path, data)
        write_durably(self._folder / f"state-{number}.json", seal(*_SEAL, dataclasses.asdict(record)))
        self._latest = number
        self._saved = time.monotonic()

    def clear(self) -> None:
        """The task is in the checkpoint. Raises CheckpointError where the disk refuses."""
        try:
            _remove(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from error


class _Journal(loop.Journal):
    """A phase's view of its task's Keeper."""

    def __init__(self, keeper: Keeper, phase: str):
        self._keeper = keeper
        self._phase = phase
        self.start = keeper.state.snapshot if keeper.state and keeper.state.phase == phase else None

    def after_step(self, step: int, steps: int, snapshot: Callable[[], loop.Snapshot]) -> None:
        # Calibration's end is kept as the positions it has chosen.
        over = step == steps and self._phase == TRAINING and group.is_first()
        if over or self._keeper.is_due():
            self._keeper.keep(snapshot())


def digest_of(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of examples in their order; dataclasses of numbers, strings and lists of them."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(example).encode())
    return found.hexdigest()


def tidy(output: Path, finished: Collection[str]) -> None:
    """Removes what killed runs left and nobody needs: temporary files, the state of a task that is finished.

    Args:
        finished: tasks that the checkpoint has.
    """
    with contextlib.suppress(OSError):  # they do no harm where they cannot be removed
        for folder in (output, output / "tasks"):
            for file in folder.glob(".*.tmp"):
                match = _TEMPORARY.fullmatch(file.name)
                if match and not _is_running(int(match[1])):
                    file.unlink(missing_ok=True)
        folder = output / FOLDER
        if folder.is_dir() and all(_task_of(folder / f"state-{n}.json") in finished for n in _numbers(folder)):
            _remove(folder)


def _is_running(process: int) -> bool:
    """Whether another process of this machine has this number."""
    if process == os.getpid():  # in a container the killed run had the same
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _task_of(file: Path) -> str | None:
    try:
        return _read(file)[0].task
    except (OSError, ValueError):
        return None


_NAMES = {
    "examples": "the training data",
    "earlier": "the adapter's A or its earlier tasks",
    "base": "the base model's weights",
}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words."""
    found = []
    for field, was, becomes in differences(before, now):
        name = _NAMES.get(field)
        shown = f"{field.removeprefix('settings.')} was {said(was)}, is {said(becomes)}"
        found.append(f"{name} changed" if name else shown)
    return "; ".join(found)


def _numbers(folder: Path, any_file: bool = False) -> set[int]:
    """Numbers of the states in `folder`; with `any_file` also of those of which there are only parts."""
    if not folder.is_dir():
        return set()
    matches = ((_OURS if any_file else _STATE).fullmatch(name) for name in os.listdir(folder))
    return {int(match[1]) for match in matches if match}


def _make_durably(folder: Path) -> None:
    """A new folder is an entry of its parent."""
    if folder.is_dir():
        return
    folder.mkdir()
    _flush(folder.parent)


def _remove(folder: Path, keep: int | None = None) -> None:
    """Removes all states but one; the folder too if none is to stay. What is not ours stays."""
    if not folder.is_dir():
        return
    matches = [match for match in map(_OURS.fullmatch, os.listdir(folder)) if match and int(match[1]) != keep]
    for match in sorted(matches, key=lambda m: m[2]):  # the JSON first: a state is whole or is none
        (folder / match[0]).unlink(missing_ok=True)
    if keep is None and not os.listdir(folder):
        folder.rmdir()
        _flush(folder.parent)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(file: Path) -> tuple[_Record, str]:
    """The record in a state's JSON file, and its digest. Raises OSError, ValueError."""
    content, digest = unseal(file.read_bytes(), *_SEAL)
    faults: list[str] = []
    record = strict_json.build(_Record, content, "", lambda where, message: faults.append(f"{where} {message}"))
    if record is None or record.tensors.path != f"{file.stem}.safetensors":
        raise ValueError("; ".join(faults) or "it names another state's tensors")
    return record, digest


def _state(folder: Path, record: _Record) -> State:
    """Raises OSError, ValueError."""
    data = (folder / record.tensors.path).read_bytes()
    if len(data) != record.tensors.bytes or hashlib.sha256(data).hexdigest() != record.tensors.sha256:
        raise ValueError(f"{record.tensors.path} does not match its digest")
    try:
        tensors = task_file.parse(memoryview(bytearray(data)))
    except ValueError as error:
        raise ValueError(f"{record.tensors.path} is no safetensors file: {error}") from None
    masks = {name.removeprefix(_MASK): t.long() for name, t in tensors.items() if name.startswith(_MASK)}
    if not record.steps:
        return State(masks, None)
    losses = [math.nan if loss is None else loss for loss in (record.first_loss, record.last_loss)]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MASK)}
    return State(masks or None, loop.Snapshot(record.step, record.steps, *losses, rest))
