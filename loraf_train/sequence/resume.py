"""Saves the state of the task in progress, so that a killed run can continue where it was.

    <output>/.resume/state-<n>.json          task, everything its values depend on, phase, step; digests of both files
    <output>/.resume/state-<n>.safetensors   positions once they are selected; parameters and optimizer state

The folder is not part of the checkpoint: only `loraf-train run` reads it, and it is removed once the task is in the
checkpoint. The previous state stays until the next one is on disk, and is used if the last one is damaged. A state is
used only if everything that determines the task's values is unchanged: settings, examples, base model, earlier tasks,
precision and versions. A task that was begun before dropout was drawn by token is finished as it was begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from loraf.checkpoint import folders_of, unwritable, write_durably
from loraf.errors import CheckpointError, Problem
from loraf.files import strict_json, strict_safetensors
from loraf.files.bounded_file import read_bounded
from loraf.files.durable_folder import flush_folder, make_durably, remove_leftovers
from loraf.files.sealed_json import seal, unseal
from loraf.manifest import StoredFile
from loraf_train.processes import group
from loraf_train.sequence.phases import CALIBRATION, TRAINING
from loraf_train.sequence.provenance import differences, value_text
from loraf_train.trainer import loop

FOLDER = ".resume"
_SEAL = "loraf-resume", 1
_RECORD_FILE = re.compile(r"state-(\d+)\.json")
_STATE_FILE = re.compile(r"\.?state-(\d+)\.(json|safetensors)(\.\d+\.tmp)?")
DROPOUT, BY_TOKEN = "dropout", "by token"  # in the provenance if the task draws anything; older states lack it
RETENTION = "retention"  # in the provenance if earlier tasks are protected; older states lack it
GENERAL = "general"  # in the provenance if the base model is protected: the digest of the text
DATE = "date"  # in the provenance if the prompts name one
_LARGEST_RECORD = 1 << 24  # bytes
_POSITIONS = "mask."  # prefix of the stored tensors' names; part of the format, like the fields of _Record
_CALIBRATED_ON = "stream.calibration"  # the name of a tensor


@dataclass(frozen=True)
class State:
    """Progress of a task.

    Attributes:
        positions: module → (K,) int64 positions, ascending; None: calibration is not finished.
        snapshot: of the current phase; None: at its beginning.
        calibrated_on: SHA-256 of the streamed examples that chose the positions; empty: none were streamed.
    """

    positions: dict[str, torch.Tensor] | None
    snapshot: loop.Snapshot | None
    calibrated_on: bytes = b""

    @property
    def phase(self) -> str:
        return CALIBRATION if self.positions is None else TRAINING

    def __str__(self) -> str:
        if self.snapshot is None:
            return CALIBRATION
        return f"{self.phase} step {self.snapshot.step} of {self.snapshot.steps}"


@dataclass(frozen=True)
class _Record:
    """Content of a state's JSON file, besides format, version and digest. The field names are the format's.

    Attributes:
        making: ResumeStore's `provenance`.
        where: ResumeStore's `environment`.
        step, steps: done and in all of the current phase; both 0 at its beginning.
    """

    task: str
    making: dict[str, Any]
    where: dict[str, Any]
    step: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    tensors: StoredFile


class ResumeStore:
    """The saved states of one task in training. Every process has a store; only the first one writes.

    Attributes:
        state: where to resume; None: start the task from the beginning.
        dropout_by_token: False: `state` is from before dropout was drawn by token; see `loop.Journal`.
        retention: False: `state` began without retention, and so it ends.
        remarks: what to tell the user about the states on disk.

    Args:
        output: the checkpoint's folder.
        provenance: everything the task's values depend on, as plain JSON: `settings`, and one value for each other
            thing. A state with another provenance is not used.
        environment: what only the last bits of the values depend on, as plain JSON.
        seconds: time between two saves within a phase.
        device: the one this process computes on.
        misfit: returns what cannot be in a state of this task (`state_check.TaskShape.misfit`); empty if it fits.

    Raises:
        CheckpointError: the processes do not see the same state.
    """

    def __init__(
        self,
        output: Path,
        task: str,
        provenance: Mapping[str, Any],
        environment: Mapping[str, Any],
        seconds: float,
        device: torch.device,
        misfit: Callable[[Mapping[str, torch.Tensor] | None, loop.Snapshot | None], str] = lambda positions, last: "",
    ):
        self._folder = output / FOLDER
        self._task = task
        self._provenance, self._environment = strict_json.plain(provenance), strict_json.plain(environment)
        self._seconds = seconds
        self._misfit = misfit
        self._latest: int | None = None  # number of the newest usable state on disk
        self.state: State | None = None
        self.dropout_by_token = True
        self.retention = RETENTION in self._provenance
        self.remarks: list[str] = []
        digest = self._load_newest()
        self._positions: dict[str, torch.Tensor] | None = self.state.positions if self.state else None
        self._calibrated_on = self.state.calibrated_on if self.state else b""
        if not group.agree(int(digest[:15], 16), device):
            message = "the processes of this run do not see the same saved state of the task"
            remedy = "make the same folder visible to all of them, or delete it to start the task from the beginning"
            raise CheckpointError(Problem(message, file=str(self._folder), remedy=remedy))
        self._saved_at = time.monotonic()

    def _load_newest(self) -> str:
        """Sets `state` and `remarks`; returns the digest (hex) of the state that was loaded."""
        for number in sorted(_numbers(self._folder), reverse=True):
            file = self._folder / f"state-{number}.json"
            try:
                record, digest = _read(file)
                refusal = self._refusal(record)
                state = None if refusal else _state(self._folder, record)
                fault = self._misfit(state.positions, state.snapshot) if state else ""
                if fault:
                    raise ValueError(fault)
            except (OSError, ValueError) as error:
                self.remarks.append(f"{file} cannot be used ({error})")
                continue
            if state is not None:
                self.state, self._latest = state, number
                self._remark_on(record)
                return digest
            if refusal not in self.remarks:
                self.remarks.append(refusal)
        return "0" * 64

    def _remark_on(self, record: _Record) -> None:
        """Takes over how the loaded state's task draws dropout, and remarks on what differs now."""
        changes = _changes(record.where, self._environment)
        if self.retention and RETENTION not in record.making:
            self.retention = False
            self._provenance = _without(self._provenance, RETENTION)  # so that the next state says the same
            self.remarks.append("this task was begun without retention, and ends without it")
        if self._drawn_before(record):
            self.dropout_by_token = False
            self._provenance = _without(self._provenance, DROPOUT)  # so that the next state says the same
            self.remarks.append(
                "an earlier version began this task, so until its end dropout depends on micro-batches and processes"
                + (f"; the values will differ as with another seed: {changes}" if changes else "")
            )
        elif changes:
            self.remarks.append(f"the environment changed, so the last bits may differ: {changes}")

    def _drawn_before(self, record: _Record) -> bool:
        """Whether something is drawn in the task, and the state is from before it was drawn by token."""
        return DROPOUT in self._provenance and DROPOUT not in record.making

    def _refusal(self, record: _Record) -> str:
        """Why a state cannot be used; empty if it can."""
        if record.task != self._task:
            return f"the saved state of the interrupted task {record.task!r} is discarded"
        now = _without(self._provenance, DROPOUT) if self._drawn_before(record) else self._provenance
        if RETENTION not in record.making:
            now = _without(now, RETENTION)
        changes = _changes(record.making, now)
        return f"the saved state of the interrupted training cannot be used: {changes}" if changes else ""

    def journal(self, phase: str) -> loop.Journal:
        """Returns the journal with which `loop.fit` resumes and saves this phase."""
        return _Journal(self, phase)

    def save_positions(self, positions: Mapping[str, torch.Tensor], calibrated_on: bytes = b"") -> None:
        """Saves the result of calibration, see `State`. Raises CheckpointError if it cannot be written."""
        self._positions, self._calibrated_on = dict(positions), calibrated_on
        self.save(None)

    def is_due(self) -> bool:
        """Whether it is time for this process to save."""
        return group.is_first() and time.monotonic() - self._saved_at >= self._seconds

    def save(self, snapshot: loop.Snapshot | None) -> None:
        """Writes a state, then removes all but the one before it. Raises CheckpointError if it cannot be written.

        Args:
            snapshot: of the current phase; None: training is at its beginning.
        """
        if not group.is_first():
            return
        try:
            number = max(_numbers(self._folder, any_file=True), default=0) + 1
            _remove(self._folder, keep=self._latest)  # before writing, to free the space
            make_durably(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        positions = self._positions or {}
        tensors = {f"{_POSITIONS}{module}": p.to(torch.int32) for module, p in positions.items()}
        if self._calibrated_on:
            tensors[_CALIBRATED_ON] = torch.tensor(list(self._calibrated_on), dtype=torch.uint8)
        data = safetensors.torch.save(tensors | (snapshot.tensors if snapshot else {}))
        record = _Record(
            task=self._task,
            making=self._provenance,
            where=self._environment,
            step=snapshot.step if snapshot else 0,
            steps=snapshot.steps if snapshot else 0,
            first_loss=snapshot.first_loss if snapshot else None,
            last_loss=snapshot.last_loss if snapshot else None,
            tensors=StoredFile(f"state-{number}.safetensors", len(data), hashlib.sha256(data).hexdigest()),
        )
        write_durably(self._folder / record.tensors.path, data)
        write_durably(self._folder / f"state-{number}.json", seal(*_SEAL, dataclasses.asdict(record)))
        self._latest = number
        self._saved_at = time.monotonic()

    def clear(self) -> None:
        """Removes all states: the task is in the checkpoint. Raises CheckpointError if they cannot be removed."""
        try:
            _remove(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from error


class _Journal(loop.Journal):
    """Resumes and saves one phase of a task through its ResumeStore."""

    def __init__(self, store: ResumeStore, phase: str):
        self._store = store
        self._phase = phase
        self.start = store.state.snapshot if store.state and store.state.phase == phase else None
        self.dropout_by_token = store.dropout_by_token

    def after_step(self, step: int, steps: int, snapshot: Callable[[], loop.Snapshot]) -> None:
        # The end of calibration is saved as the positions it selects.
        finished = step == steps and self._phase == TRAINING and group.is_first()
        if finished or self._store.is_due():
            self._store.save(snapshot())


def begun_on(output: Path) -> str:
    """Returns the date in the newest readable state, YYYY-MM-DD; empty if it has none, or there is no state."""
    for number in sorted(_numbers(output / FOLDER), reverse=True):
        try:
            return str(_read(output / FOLDER / f"state-{number}.json")[0].making.get(DATE, ""))
        except (OSError, ValueError):
            continue
    return ""


def tidy(output: Path, finished: Collection[str]) -> None:
    """Removes leftovers of killed runs: temporary files, and the state of a finished task.

    Args:
        finished: tasks that the checkpoint has.
    """
    with contextlib.suppress(OSError):  # leftovers do no harm
        remove_leftovers(folders_of(output))
        folder = output / FOLDER
        if folder.is_dir() and all(_task_of(folder / f"state-{n}.json") in finished for n in _numbers(folder)):
            _remove(folder)


def _task_of(file: Path) -> str | None:
    try:
        return _read(file)[0].task
    except (OSError, ValueError):
        return None


def _without(provenance: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: part for name, part in provenance.items() if name != key}


_CHANGED_PARTS = {
    "examples": "the training data",
    "earlier": "the adapter's A or its earlier tasks",
    "base": "the base model's weights",
    "general": "the general text that protects the base model",
    "evaluation": "the evaluation data, which decides when to stop",
}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes what differs, for a message; empty if nothing does."""
    changes = []
    for field, old, new in differences(before, now):
        part = _CHANGED_PARTS.get(field)
        name = field.removeprefix("settings.")
        changes.append(f"{part} changed" if part else f"{name} was {value_text(old)}, is {value_text(new)}")
    return "; ".join(changes)


def _numbers(folder: Path, any_file: bool = False) -> set[int]:
    """Numbers of the states in `folder`; with `any_file` also of incomplete ones."""
    if not folder.is_dir():
        return set()
    matches = ((_STATE_FILE if any_file else _RECORD_FILE).fullmatch(name) for name in os.listdir(folder))
    return {int(match[1]) for match in matches if match}


def _remove(folder: Path, keep: int | None = None) -> None:
    """Removes all states but number `keep`; without one, the folder too. Leaves other files alone."""
    if not folder.is_dir():
        return
    matches = [match for match in map(_STATE_FILE.fullmatch, os.listdir(folder)) if match and int(match[1]) != keep]
    for match in sorted(matches, key=lambda m: m[2]):  # the JSON first: without it, there is no state
        (folder / match[0]).unlink(missing_ok=True)
    if keep is None and not os.listdir(folder):
        folder.rmdir()
        flush_folder(folder.parent)


def _read(file: Path) -> tuple[_Record, str]:
    """Returns the record in a state's JSON file, and its digest. Raises OSError, ValueError."""
    content, digest = unseal(read_bounded(file, _LARGEST_RECORD), *_SEAL)
    problems: list[str] = []
    record = strict_json.build(_Record, content, "", lambda field, message: problems.append(f"{field} {message}"))
    if record is None or record.tensors.path != f"{file.stem}.safetensors":
        raise ValueError("; ".join(problems) or "it names another state's tensors")
    return record, digest


def _state(folder: Path, record: _Record) -> State:
    """Reads and verifies a state's tensors. Raises OSError, ValueError."""
    data = read_bounded(folder / record.tensors.path, record.tensors.bytes)
    if len(data) != record.tensors.bytes or hashlib.sha256(data).hexdigest() != record.tensors.sha256:
        raise ValueError(f"{record.tensors.path} does not match its digest")
    try:
        stored = strict_safetensors.parse(memoryview(bytearray(data)))
    except ValueError as error:
        raise ValueError(f"{record.tensors.path} is not a safetensors file: {error}") from None
    positions = {name.removeprefix(_POSITIONS): t.long() for name, t in stored.items() if name.startswith(_POSITIONS)}
    digest = stored.pop(_CALIBRATED_ON, torch.empty(0, dtype=torch.uint8))
    if digest.dtype != torch.uint8 or list(digest.shape) not in ([0], [hashlib.sha256().digest_size]):
        raise ValueError(f"{_CALIBRATED_ON} is not a digest")
    calibrated_on = bytes(digest.tolist())
    if not record.steps:
        return State(positions, None, calibrated_on)
    first_loss, last_loss = (math.nan if loss is None else loss for loss in (record.first_loss, record.last_loss))
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(_POSITIONS)}
    snapshot = loop.Snapshot(record.step, record.steps, first_loss, last_loss, tensors)
    return State(positions or None, snapshot, calibrated_on)
