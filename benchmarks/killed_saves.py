"""Kills saves of a checkpoint with SIGKILL at random moments, and looks at what is left.

    python benchmarks/killed_saves.py      writes results/killed-saves.json

Every kind of save is killed as often as the others, at a moment drawn from the time that it takes. Then the checkpoint
must be the old one or the new one, bit for bit and readable (statistics that are replaced may also be gone), and the
next save must succeed and leave nothing else in the folder. A save that ends before its kill does not count.
Exit status 1: something else happened.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "killed-saves.json"
SHAPES = {"model.layers.0.self_attn.q_proj": (20_000, 24), "model.layers.0.mlp.up_proj": (17, 24)}
RANK = 8
SPARSITY = 0.8
TIMED = 5  # saves of each kind whose time is taken
TRIES = 40  # of one kill; more mean that no kill comes in time
LISTED = 20
SCORES = [{"set": "math", "evaluation": "e", "metric": "exact", "score": 0.5, "count": 20}]
WEIGHTS = {"math": 1.0, "nlu": 0.5}
ABSENT = "absent"  # the state without a checkpoint

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Save:
    """A kind of save.

    Attributes:
        prepare: makes the folder on which it is done; None: an empty one.
        begin: reads what is there, and returns the save itself.
        between: another state that may be left, by what would have made it; None: there is none.
    """

    name: str
    prepare: Callable[[Path], None] | None
    begin: Callable[[Path], Callable[[], None]]
    between: Callable[[Path], None] | None = None

    def save(self, folder: Path) -> None:
        self.begin(folder)()


def saves() -> list[Save]:
    """All kinds of saves, each under the folder's lock, as the commands do them."""
    import torch

    from loraf.checkpoint import Checkpoint
    from loraf.files.folder_lock import locked
    from loraf.manifest import BaseModel
    from loraf_train.retention.statistics import ModuleStatistics, encode
    from tests.standins import random_values

    base = BaseModel("org/model", "LlamaForCausalLM", "f" * 64, None, {"hidden_size": 24})
    values = random_values(SHAPES, RANK, ("math", "nlu", "code"), SPARSITY, seed=0)

    def gathered(seed: int) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        of_modules = {
            name: ModuleStatistics(
                torch.randn(d_out, 16, generator=generator), torch.rand(d_out, generator=generator), torch.eye(RANK)
            )
            for name, (d_out, _) in SHAPES.items()
        }
        return encode(of_modules)

    old, new = gathered(0), gathered(1)

    def make(folder: Path) -> None:
        Checkpoint.create(folder, base, RANK, SHAPES, seed=0)

    def two_tasks(folder: Path) -> None:
        make(folder)
        for task in ("math", "nlu"):
            Checkpoint.open(folder).add_task(task, values[task], alpha=16.0, sparsity=SPARSITY)

    def protected(folder: Path) -> None:
        two_tasks(folder)
        Checkpoint.open(folder).set_statistics("math", old)
        Checkpoint.open(folder).set_named_set("careful", WEIGHTS)

    def save_to(write: Callable[[Checkpoint], object]) -> Callable[[Path], Callable[[], None]]:
        def begin(folder: Path) -> Callable[[], None]:
            checkpoint = Checkpoint.open(folder)
            return under_lock(folder, lambda: write(checkpoint))

        return begin

    def under_lock(folder: Path, write: Callable[[], object]) -> Callable[[], None]:
        def save() -> None:
            with locked(folder, "killed_saves"):
                write()

        return save

    def code(checkpoint: Checkpoint, protected: bytes | None = None) -> None:
        checkpoint.add_task("code", values["code"], alpha=16.0, sparsity=SPARSITY, statistics=protected)

    return [
        Save("create", None, lambda folder: under_lock(folder, lambda: make(folder))),
        Save("add a task", two_tasks, save_to(code)),
        Save("add a task with statistics", protected, save_to(lambda c: code(c, new))),
        Save("store scores", protected, save_to(lambda c: c.set_scores("math", SCORES))),
        Save("store a named set", two_tasks, save_to(lambda c: c.set_named_set("careful", WEIGHTS))),
        Save("gather statistics", two_tasks, save_to(lambda c: c.set_statistics("math", new))),
        Save(
            "gather statistics again",
            protected,
            save_to(lambda c: c.set_statistics("math", new)),
            lambda folder: Checkpoint.open(folder).set_statistics("math", None),
        ),
        Save("remove statistics", protected, save_to(lambda c: c.set_statistics("math", None))),
        Save(
            "remove a task",
            protected,
            lambda folder: under_lock(folder, lambda: Checkpoint.remove_task(folder, "math")),
        ),
    ]


def contents(folder: Path) -> Contents:
    """Path → content of every file, temporary ones and the lock included."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class Subject:
    """One kind of save, and the checkpoints that it may leave."""

    def __init__(self, kind: Save, folder: Path):
        self.kind, self._folder = kind, folder
        self.before = folder / "before"
        self.before.mkdir(parents=True)
        if kind.prepare:
            kind.prepare(self.before)
        self.states: dict[str, Contents] = {"old": contents(self.before)}
        if kind.between:
            self.states["between"] = contents(self._done(kind.between))
        self.states["new"] = contents(self._done(kind.save))
        self.seconds = statistics.median(self._time() for _ in range(TIMED))

    def _copy(self) -> Path:
        target = self._folder / "work"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.before, target)
        return target

    def _done(self, save: Callable[[Path], None]) -> Path:
        target = self._copy()
        save(target)
        return target

    def _time(self) -> float:
        """Returns the seconds that one save takes in a process of its own."""
        child, go = self._started(self._copy())
        began = time.perf_counter()
        os.write(go, b"!")
        os.close(go)
        self._require_done(os.waitpid(child, 0)[1])
        return time.perf_counter() - began

    def kill(self, chance: random.Random) -> tuple[Path, float] | None:
        """Kills one save. Returns the folder and the moment in seconds; None if it never comes in time."""
        for _ in range(TRIES):
            target, moment = self._copy(), chance.uniform(0, self.seconds)
            child, go = self._started(target)
            end = time.perf_counter() + moment
            os.write(go, b"!")
            while (left := end - time.perf_counter()) > 0:
                time.sleep(max(0.0, left - 0.0005))  # the rest is waited for in a loop
            os.kill(child, signal.SIGKILL)
            os.close(go)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                return target, moment
            self._require_done(status)
        return None

    def _started(self, target: Path) -> tuple[int, int]:
        """Starts a process that is about to save. Returns it, and the pipe on which it waits for a byte."""
        start, go = os.pipe()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(go)
                save = self.kind.begin(target)
                os.write(told, b"!")
                os.read(start, 1)
                save()
                status = 0
            finally:
                os._exit(status)
        os.close(start)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return child, go

    def _require_done(self, status: int) -> None:
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{self.kind.name}: a save failed without being killed")

    def judge(self, folder: Path) -> tuple[str, list[str], str | None]:
        """Returns the state that a killed save has left, what else lies there, and what is wrong."""
        from loraf.checkpoint import Checkpoint
        from loraf.errors import LorafError, UnknownTask

        left = contents(folder)
        state = self._state(left)
        if state is None:
            return "neither", sorted(left), "it is neither the old checkpoint nor the new one"
        rest = sorted(left.keys() - self.states[state].keys())
        try:
            if self.states[state]:
                opened = Checkpoint.open(folder)
                opened.verify_projection()
                opened.verify_statistics()
            if self.kind.name == "create" and state == "new":
                return state, rest, self._after_another_save(folder)
            try:
                self.kind.save(folder)
            except (UnknownTask, LorafError) as error:
                done_already = state == "new" and "already exists" in str(error) or "there is no task" in str(error)
                return state, rest, self._after_another_save(folder) if done_already else f"the next save: {error}"
        except LorafError as error:
            return state, rest, f"it cannot be read: {error}"
        return state, rest, self._difference(folder, self.states["new"])

    def _state(self, left: Contents) -> str | None:
        """The state whose files are all there as they should be."""
        for name, files in self.states.items():
            manifest = files.get("loraf.json")
            if left.get("loraf.json") == manifest and all(left.get(path) == data for path, data in files.items()):
                return name
        return None

    def _after_another_save(self, folder: Path) -> str | None:
        """Stores the scores that are there once more, which changes nothing but what is left of the killed save."""
        from loraf.checkpoint import Checkpoint
        from loraf.files.folder_lock import locked

        with locked(folder, "killed_saves"):
            opened = Checkpoint.open(folder)
            opened._commit(opened.manifest)
        return self._difference(folder, self.states["new"])

    def _difference(self, folder: Path, expected: Contents) -> str | None:
        now = contents(folder)
        differing = sorted(path for path in now.keys() | expected.keys() if now.get(path) != expected.get(path))
        return f"after the next save other files than expected: {', '.join(differing)}" if differing else None


def kind_of_leftover(path: str) -> str:
    if path.endswith(".tmp"):
        return "temporary file"
    return "lock" if path == ".lock" else "file that the manifest does not name"


def campaign(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    chance, began = random.Random(seed), time.monotonic()
    subjects = [Subject(kind, folder / str(i)) for i, kind in enumerate(saves())]
    results: dict[str, dict[str, Any]] = {
        s.kind.name: {"kills": 0, "save_ms": round(1000 * s.seconds, 1), "left": Counter(), "also left": Counter()}
        for s in subjects
    }
    findings: list[dict[str, Any]] = []
    for number in range(kills):
        subject = subjects[number % len(subjects)]
        killed = subject.kill(chance)
        if killed is None:
            raise SystemExit(f"{subject.kind.name}: no kill came in time in {TRIES} tries")
        target, moment = killed
        state, rest, fault = subject.judge(target)
        result = results[subject.kind.name]
        result["kills"] += 1
        result["left"][state] += 1
        result["also left"].update(kind_of_leftover(path) for path in rest)
        if fault and len(findings) < LISTED:
            findings.append({"save": subject.kind.name, "moment_s": round(moment, 6), "left": state, "fault": fault})
        if (number + 1) % 100 == 0:
            print(f"{number + 1:,} kills, {len(findings)} findings", flush=True)
    return {
        "question": "What does a save leave that is killed at a random moment?",
        "kills": sum(result["kills"] for result in results.values()),
        "faults": len(findings),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "saves": results,
        "findings": findings,
        "python": platform.python_version(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(RESULT), metavar="FILE", help="(default: %(default)s; -: nowhere)")
    options = parser.parse_args()
    import torch

    from loraf import system

    torch.set_num_threads(1)  # threads do not survive a fork
    system.processors = lambda: 1
    with tempfile.TemporaryDirectory() as name:
        record = campaign(options.kills, options.seed, Path(name))
    print(json.dumps({key: record[key] for key in ("kills", "faults", "seconds", "saves", "findings")}, indent=1))
    if options.out != "-":
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(record["faults"]))


if __name__ == "__main__":
    main()
