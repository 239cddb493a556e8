"""Loads changed checkpoints as the server does, and says whether what happened was right.

Right is a LorafError that names a file of the checkpoint and nothing of this machine, or a load whose ΔW is what a slow
reader, which shares nothing with loraf, makes of the same files; within bounds of time and memory. The streaming reader
has to agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import time
import traceback
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.delta import delta_weight
from loraf.errors import CorruptCheckpoint, LorafError
from loraf.tasksets import TaskSet
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.errors import InvalidRequest
from tests.loraf import slow_checkpoint
from tests.loraf.hostile_changes import Choices
from tests.loraf.mutants import MANIFEST, Base, Mutant, mutant
from tests.standins import random_values

SECONDS = 2.0  # of processor time
MEMORY = 64 << 20  # bytes by which the most memory taken may grow in one load
ADDRESSES = 1 << 30  # bytes of address space beyond what the process has: of what is reserved and not touched
TEXT = 2000  # characters of one problem
TASKS = ("math", "nlu")
RANK = 4
SHAPES = {"model.layers.0.self_attn.q_proj": (300, 16), "model.layers.0.mlp.up_proj": (12, 16)}
TOLERANCE = 1e-12  # of the sum of the absolute values of ΔW's terms; both are computed in float64
_STATISTICS = b"\2\0\0\0\0\0\0\0{}" + bytes(40)  # any bytes: a loader does not read them
_SCORE = {"set": "math", "evaluation": "e", "metric": "exact", "score": 0.5, "count": 20}
_SETTINGS = {"training": {"learning_rate": 1e-4}, "data": {"train": [{"dataset": "org/data"}]}}
SPARSITY = 0.97


@dataclass(frozen=True)
class Verdict:
    """What happened.

    Attributes:
        outcome: "loaded", or the name of the error.
        checks: what the error says, without names and numbers: the checks that the mutant has reached.
        fault: what was wrong; None: nothing.
        seconds: of processor time.
        slow_reads: whether the slow reader was asked about a refused mutant, and reads it.
    """

    outcome: str
    checks: tuple[str, ...] = ()
    fault: str | None = None
    seconds: float = 0.0
    slow_reads: bool = False


class World:
    """Below a folder: a model, and checkpoints of both format versions, which are changed in place."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        self.model.mkdir(parents=True)
        (self.model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 16}))
        weights = {f"{name}.weight": torch.full(shape, 0.5) for name, shape in SHAPES.items()}
        save_file(weights, self.model / "model.safetensors")
        (folder / "root").mkdir()
        plain = self._checkpoint("plain", seed=0, dtypes=(torch.bfloat16, torch.float32), init_std=None)
        extended = self._checkpoint("extended", seed=7, dtypes=(torch.float16, torch.bfloat16), init_std=0.02)
        extended.set_scores("math", [_SCORE])
        extended.set_statistics("nlu", _STATISTICS)
        extended.set_named_set("careful", {"math": 1.0, "nlu": 0.5})
        self.bases = [Base(made.path) for made in (plain, extended)]
        self._on_disk: dict[Path, dict[str, bytes | tuple[str, ...]]] = {
            base.folder: {**base.files, MANIFEST: base.manifest} for base in self.bases
        }
        self._compared: set[int] = set()  # hashes of checkpoints whose ΔW has been compared
        self._roots = [AdapterRoot(folder / "root", self.model, allow_other_base=other) for other in (False, True)]

    def _checkpoint(self, name: str, seed: int, dtypes: tuple[torch.dtype, ...], init_std: float | None) -> Checkpoint:
        base = describe("org/model", self.model)
        made = Checkpoint.create(self.folder / "root" / name, base, RANK, SHAPES, seed, init_std)
        for i, (task, dtype) in enumerate(zip(TASKS, dtypes, strict=True)):
            values = random_values(SHAPES, RANK, TASKS, SPARSITY, seed, dtype=dtype)[task]
            training = {"examples": 7, "settings": _SETTINGS} if seed and i else {}
            made.add_task(task, values, alpha=16.0, sparsity=SPARSITY, trained_with=TASKS[:i], training=training)
        return made

    def judge(self, data: bytes) -> tuple[Mutant, Verdict]:
        """Makes the mutant that `data` describes, and loads it."""
        made = mutant(data, self.bases)
        self._write(made)
        chance = Choices(data[::-1])  # of the end, so that the mutant stays the same
        tasks = chance.choice(((), (), (), ()) * 4 + (("math",), ("nlu", "math"), ("none",)))
        return made, self._judge(made, tasks, chance.choice(self._roots), chance.number(8) == 0)

    def _judge(self, made: Mutant, tasks: tuple[str, ...], root: AdapterRoot, all_readers: bool) -> Verdict:
        """`all_readers`: whether refused mutants are given to the other readers too."""
        before, began, folder = _most_memory(), time.thread_time(), made.base.folder
        adapter, refusal, failure = None, None, None
        try:
            adapter = root.open("adapter", root.find(folder.name, tasks))
        except LorafError as error:
            refusal = root.shown(error)
        except Exception as error:
            failure = error
        seconds, memory = time.thread_time() - began, _most_memory() - before
        outcome, fault, checks, slow_reads = "loaded", None, (), False
        try:
            if refusal:
                outcome = type(refusal).__name__
                checks = tuple(sorted({_pattern(p.message) for p in refusal.problems}))
                fault = self._wrong_error(refusal, made)
                if all_readers:
                    _is_streamed(folder, tasks, verify=False)
                    slow_reads = _slow_reads(folder, tasks)
            elif adapter and adapter.checkpoint:
                fault = self._wrong_load(made, adapter.checkpoint, tasks)
        except Exception as error:
            failure = error
        if failure:
            outcome, fault = "failed", f"{type(failure).__name__} in {_place(failure)}: {str(failure)[:200]}"
        elif seconds > SECONDS:
            fault = fault or f"took {seconds:.1f} s"
        elif memory > MEMORY:
            fault = fault or f"took {memory:,} bytes more than ever before"
        return Verdict(outcome, checks, fault, seconds, slow_reads)

    def _wrong_load(self, made: Mutant, checkpoint: Checkpoint, tasks: tuple[str, ...]) -> str | None:
        with contextlib.suppress(CorruptCheckpoint):
            checkpoint.verify_statistics()
        content = hash((made.base.folder, tasks, made.text, *(made.entries[path] for path in made.base.task_files)))
        if content in self._compared:  # many mutants are not changed where it matters
            return None
        self._compared.add(content)
        fault = self._wrong_delta(checkpoint, tasks)
        if fault is None and not _is_streamed(checkpoint.path, tasks, verify=True):
            return "the streaming reader refuses it"
        return fault

    def _wrong_delta(self, checkpoint: Checkpoint, tasks: tuple[str, ...]) -> str | None:
        """Compares ΔW of all tasks, and of the first named set, with the slow reader's."""
        try:
            slow = slow_checkpoint.read(checkpoint.path, tasks)
        except slow_checkpoint.NotACheckpoint as error:
            return f"the slow reader refuses it: {error}"
        except slow_checkpoint.TooLarge:
            return None
        manifest = checkpoint.manifest
        if list(manifest.task_names) != [task["name"] for task in slow.manifest["tasks"]]:
            return "the tasks stand in another order"
        sets = [manifest.all_tasks(), *(manifest.named_set(name) for name in list(manifest.sets)[:1])]
        for task_set in sets:
            for module in manifest.modules:
                expected, bound = slow.delta(module, dict(task_set.weights))
                actual = delta_weight(checkpoint, module, task_set, dtype=torch.float64).numpy()
                if actual.shape != expected.shape:
                    return f"ΔW of {module} has another shape"
                wrong = np.argwhere(~(np.abs(actual - expected) <= TOLERANCE * bound))
                if len(wrong):
                    row, column = wrong[0]
                    numbers = f"{actual[row, column]!r}, not {expected[row, column]!r}"
                    return f"ΔW of {module} is another one in {len(wrong)} places: at [{row}, {column}] {numbers}"
        return self._wrong_set(checkpoint, slow)

    def _wrong_set(self, checkpoint: Checkpoint, slow: slow_checkpoint.SlowCheckpoint) -> str | None:
        for name, weights in slow.manifest.get("sets", {}).items():
            if weights.keys() <= set(checkpoint.manifest.task_names):
                expected = TaskSet(tuple((t, float(weights[t])) for t in checkpoint.tasks if weights.get(t)))
                if checkpoint.manifest.named_set(name) != expected:
                    return f"the named set {name} is another one"
        return None

    def _wrong_error(self, error: LorafError, made: Mutant) -> str | None:
        folder = made.base.folder.name
        for problem in error.problems:
            text = str(problem)
            of_the_request = isinstance(error, InvalidRequest) or problem.field.startswith("tasks[")
            if not (problem.file == folder or problem.file.startswith(f"{folder}/") or of_the_request):
                return f"names no file of the checkpoint: {text}"
            if str(self.folder) in text:
                return f"names a folder of this machine: {text}"
            if any(unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") for character in text):
                return f"holds characters that steer a terminal: {text!r}"[:500]
            if len(text) > TEXT:
                return f"has {len(text):,} characters: {_pattern(text)[:200]}"
        if (
            isinstance(error, CorruptCheckpoint)
            and made.text == made.base.manifest
            and len(made.changed) == 1
            and not _specials(made)
        ):
            expected = {f"{folder}/{path}" for path in made.changed}
            if not expected & {problem.file for problem in error.problems} and "tasks/" in str(made.changed):
                return f"names another file than {made.changed}: {error}"
        return None

    def _write(self, made: Mutant) -> None:
        """Puts the mutant in the place of its checkpoint. Writes only what differs from what is there."""
        folder = made.base.folder
        there = self._on_disk[folder]
        wanted = {MANIFEST: made.text or b"", **made.entries}
        for path, entry in wanted.items():
            if not _is_own(path):
                continue
            if there.get(path) == entry:
                continue
            place = folder / path
            if not (isinstance(entry, bytes) and isinstance(there.get(path), bytes)):
                _remove(place)
            match entry:
                case bytes():
                    place.write_bytes(entry)
                case ("folder",):
                    place.mkdir()
                case ("pipe",):
                    os.mkfifo(place)
                case ("link", target):
                    place.symlink_to(target)
            there[path] = entry


def _is_own(path: object) -> bool:
    """Whether a path is one that a checkpoint's own file may have. A changed manifest may name any: one that no file
    can be called, or one of another file of this machine, which must not be overwritten."""
    return (
        isinstance(path, str) and re.fullmatch(r"loraf\.json|(tasks|statistics)/[a-z][a-z0-9.]{0,99}", path) is not None
    )


def _remove(place: Path) -> None:
    if not place.is_symlink() and place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _specials(made: Mutant) -> list[str]:
    return [path for path, entry in made.entries.items() if isinstance(entry, tuple)]


def _is_streamed(folder: Path, tasks: tuple[str, ...], verify: bool) -> bool:
    """Whether the reader that holds one module at a time reads all of it. `verify`: also A."""
    try:
        with CheckpointStream.open(folder, tasks or None) as stream:
            if verify:
                stream.verify_projection()
            stream.finish()
        return True
    except LorafError:
        return False


def _slow_reads(folder: Path, tasks: tuple[str, ...]) -> bool:
    try:
        slow_checkpoint.read(folder, tasks)
        return True
    except (slow_checkpoint.NotACheckpoint, slow_checkpoint.TooLarge):
        return False


def _pattern(text: str) -> str:
    """A message without the names and numbers in it."""
    text = re.sub(r"\bis .*, not ", "is …, not ", text, flags=re.DOTALL)
    text = re.sub(r"version .* is unknown", "version … is unknown", text, flags=re.DOTALL)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\(.*\)", "…", text, flags=re.DOTALL)
    return re.sub(r"-?\d[\d.,e+-]*", "N", text)[:120]


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
