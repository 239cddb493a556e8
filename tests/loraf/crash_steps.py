"""Stops a save at its n-th step. Every system call of the write path, and the middle of every write, is a step.

    python -m tests.loraf.crash_steps FOLDER      kills a save in FOLDER/<n> with SIGKILL at step n, for n = 1, 2, …

Each FOLDER/<n> is a copy of FOLDER/before. Prints the number of steps when a save finishes without being stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from loraf import checkpoint as module_under_test
from loraf.checkpoint import Checkpoint
from tests.loraf import small_checkpoints as small

NEW_TASK = "code"


class Steps:
    """Counts steps, and calls `stop` at step number `at`."""

    def __init__(self, at: int, stop: Callable[[], None]):
        self.at, self.stop = at, stop
        self.names: list[str] = []

    def step(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            self.stop()


class SlowStream:
    """A file in which every write takes three steps: before, in the middle, and after."""

    def __init__(self, stream, steps: Steps):
        self._stream, self._steps = stream, steps

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stream.close()

    def write(self, data: bytes) -> int:
        self._steps.step("write nothing")
        half = len(data) // 2
        self._stream.write(data[:half])
        self._stream.flush()
        self._steps.step("write half")
        self._stream.write(data[half:])
        self._steps.step("write all")
        return len(data)

    def flush(self) -> None:
        self._stream.flush()
        self._steps.step("flush")

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def stopped_at(at: int, stop: Callable[[], None]) -> Iterator[Steps]:
    """Stops the write path of loraf.checkpoint at step `at` within the context. With 0, it only counts the steps."""
    steps = Steps(at, stop)
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "open")}

    def traced(name: str):
        def call(*arguments, **keywords):
            steps.step(f"before {name}")
            result = originals[name](*arguments, **keywords)
            steps.step(f"after {name}")
            return result

        return call

    def traced_open(*arguments):
        steps.step("before opening")
        return SlowStream(open(*arguments), steps)

    # Path.read_bytes and the like do not use these names, so only writing is traced.
    module_under_test.open = traced_open
    for name in ("fsync", "replace", "open"):
        setattr(os, name, traced(name))
    try:
        yield steps
    finally:
        del module_under_test.open
        for name, original in originals.items():
            setattr(os, name, original)


def save(checkpoint: Checkpoint) -> None:
    """Adds a third task. This is the save that is stopped."""
    checkpoint.add_task(NEW_TASK, small.values()[NEW_TASK], alpha=48.0, sparsity=small.SPARSITY, trained_with=["math"])


def _killed_save(folder: Path, at: int) -> bool:
    """Runs a save that is killed at step `at`. Returns whether it had so many steps."""
    child = os.fork()
    if child == 0:
        try:
            checkpoint = Checkpoint.open(folder)
            with stopped_at(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                save(checkpoint)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return False
    raise SystemExit(f"the save at step {at} ended with status {status}")


def main() -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    root = Path(sys.argv[1])
    at = 1
    while True:
        shutil.copytree(root / "before", root / str(at))
        if not _killed_save(root / str(at), at):
            break
        at += 1
    print(at - 1)


if __name__ == "__main__":
    main()
