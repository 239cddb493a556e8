"""Kills `loraf-train run` with SIGKILL at seeded random moments, starts it again, and compares every byte at the end.

    python -m tests.loraf_train.kill_runs --kills 50 --seed 0

A third of the moments are drawn from the time that an uninterrupted run takes, a third from the system calls with
which it writes (before, during and after each), a third from those of its commits, each of which takes a few
milliseconds. A run is restarted until it finishes. Then its folder must equal that of an uninterrupted run, and the
next run begins. The last line is a JSON object: kills of each kind, and what was on disk after them. Exit status 1: a
folder differs, or a run failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.loraf.crash_steps import stopped_at
from tests.loraf_train.command_line import write_data
from tests.loraf_train.interruptions import contents
from tests.standins import make_model

TASKS = """
model: base
output: ckpt
adapter: {rank: 8, sparsity: 0.6, target_modules: [q_proj, down_proj]}
calibration: {steps: 3, learning_rate: 1e-2}
training:
  {learning_rate: 2e-2, batch_size: 4, micro_batch_size: 2, epochs: 3, dropout: 0.2, schedule: linear, warmup_steps: 1,
   save_seconds: 0}
tasks:
  - {name: upper, metric: loss, data: {train: upper.jsonl, eval: upper.jsonl}}
  - {name: truth, data: {train: truth.jsonl, eval: truth.jsonl, prompt: "{q}", completion: "{a}"}, max_new_tokens: 2}
"""


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kind: str = "", moment: float = 0) -> bool:
    """Runs `loraf-train run` in a fork of this process.

    Args:
        kind: unit of `moment`: seconds of "time", steps of "write" in the whole run, or steps of "commit". Empty: the
            run is not killed, and writes its number of steps of each kind to `steps.json`.

    Returns:
        Whether it finished.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = _killed_run(kind, moment)
            sys.stdout.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise SystemExit(f"a run in {folder} ended with status {status}:\n{(folder / 'log').read_text()[-3000:]}")
    return True


def _killed_run(kind: str, moment: float) -> int:
    from loraf.checkpoint import Checkpoint
    from loraf_train.cli import main

    commit, within = Checkpoint._commit, 0
    if kind == "time":
        threading.Timer(moment, kill_me).start()
        return main(["run", "tasks.yaml"])
    if kind == "commit":

        def killed_commit(*arguments) -> None:
            nonlocal within
            with stopped_at(moment - within, kill_me) as steps:
                commit(*arguments)
            within += len(steps.names)

        Checkpoint._commit = killed_commit
        return main(["run", "tasks.yaml"])
    with stopped_at(moment, kill_me) as steps:  # 0: never

        def counted_commit(*arguments) -> None:
            nonlocal within
            before = len(steps.names)
            commit(*arguments)
            within += len(steps.names) - before

        Checkpoint._commit = counted_commit
        status = main(["run", "tasks.yaml"])
    if not kind:
        Path("steps.json").write_text(json.dumps({"write": len(steps.names), "commit": within}))
    return status


def progress_on_disk(output: Path) -> str:
    """Describes what a killed run left on disk."""
    from loraf import manifest

    if not (output / manifest.FILE_NAME).exists():
        return "no checkpoint yet"
    checkpoint = manifest.read(output)
    if list(output.rglob("*.tmp")):
        return "in the middle of a file"
    if any(path.stem not in checkpoint.task_names for path in (output / "tasks").iterdir()):
        return "between a task's file and the manifest"
    records = sorted((output / ".resume").glob("*.json"), key=lambda path: int(path.stem.split("-")[1]))
    if not records:
        return f"{len(checkpoint.tasks)} tasks, no state"
    newest = json.loads(records[-1].read_text())
    tensors = (output / ".resume" / newest["tensors"]["path"]).read_bytes()
    phase = "training" if b'"mask.' in tensors else "calibration"
    if newest["task"] in checkpoint.task_names:
        return "committed, state not yet removed"
    return phase if newest["step"] else "calibration is finished"


def kill_runs(folder: Path, kills: int, seed: int) -> dict:
    """Does what the module describes, in `folder`. Returns the counts of the last line."""
    chance = random.Random(seed)
    make_model("llama", folder / "base")
    write_data(folder)
    (folder / "tasks.yaml").write_text(TASKS)
    begin = time.monotonic()
    run(folder)
    duration = time.monotonic() - begin
    steps = json.loads((folder / "steps.json").read_text())
    expected = contents(folder / "ckpt")
    print(f"an uninterrupted run: {duration:.1f} s, {len(expected)} files, steps of writing {steps}", flush=True)
    kinds: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    runs = 0
    while kinds.total() < kills:
        shutil.rmtree(folder / "ckpt")  # the manifest names the model's folder, so each run is in the same one
        (folder / "log").unlink()
        runs += 1
        kill_log, ended = [], False
        while not ended:
            if kinds.total() == kills:
                ended = run(folder)
                continue
            kind = chance.choice(("time", "write", "commit"))
            moment = chance.uniform(0, duration) if kind == "time" else chance.randint(1, steps[kind])
            ended = run(folder, kind, moment)
            if not ended:
                kinds[kind] += 1
                progress = progress_on_disk(folder / "ckpt")
                places[progress] += 1
                kill_log.append(f"{kind} {moment:.4g} ({progress})")
        actual = contents(folder / "ckpt")
        differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        print(
            f"run {runs}: killed at {', '.join(kill_log) or 'no moment'}: {differing or 'the same bytes'}", flush=True
        )
        if differing:
            raise SystemExit(
                f"{folder / 'ckpt'} differs from the result of an uninterrupted run: {', '.join(differing)}"
            )
    return {"kills": dict(kinds), "runs": runs, "left": dict(sorted(places.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder to work in, which is kept; default: a temporary one")
    options = parser.parse_args()
    import torch
    import transformers  # noqa: F401  (once, for all forks)

    torch.set_num_threads(1)  # threads do not survive a fork
    with contextlib.ExitStack() as stack:
        if options.folder:
            options.folder.mkdir(parents=True)
            root = options.folder
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(json.dumps(kill_runs(root, options.kills, options.seed)))


if __name__ == "__main__":
    main()
