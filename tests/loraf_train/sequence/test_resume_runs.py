"""The command when it is stopped: killed at random moments, one of two processes killed, full disk, interrupt."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from loraf_train.sequence import runner
from tests.loraf.crash_steps import stopped_at
from tests.loraf_train.command_line import digests, run
from tests.loraf_train.interruptions import Stopper, contents, data, run_config
from tests.standins import make_model

ROOT = Path(__file__).parents[3]


def run_module(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, timeout=300, capture_output=True, text=True, env=_ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes():
    """For more kills: python -m tests.loraf_train.kill_runs --kills 50 --seed 0"""
    out = run_module("tests.loraf_train.kill_runs", "--kills", "4", "--seed", "3")
    counts = json.loads(out.splitlines()[-1])
    assert sum(counts["kills"].values()) == sum(counts["left"].values()) == 4
    assert counts["runs"] == out.count("the same bytes") >= 1


# --- what the user sees ----------------------------------------------------------------------------------------------


def test_after_a_full_disk_or_an_interrupt_the_same_command_resumes(copied, capsys):
    expected = digests(copied / "ckpt")
    shutil.rmtree(copied / "ckpt")
    command = ("run", "tasks.yaml", "--set", "training.save_seconds=0", "--no-eval")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with stopped_at(200, full):
        status, _, err = run(capsys, *command)
    assert status == 2 and "Traceback" not in err
    assert "ckpt/.resume/state-" in err and "No space left on device" in err and "run the same command again" in err
    with stopped_at(100, interrupt):
        status, out, err = run(capsys, *command)
    assert status == 130 and "interrupted" in err and "upper: resumes after training step" in out
    status, out, _ = run(capsys, *command)
    assert status == 0 and "upper: resumes after training step" in out
    now = digests(copied / "ckpt")
    assert now.keys() == expected.keys()
    assert all(now[name] == expected[name] for name in now if name.startswith("tasks/"))


# --- two processes ---------------------------------------------------------------------------------------------------


class Deadly(Stopper):
    """Kills its process at a step."""

    def record(self, event):
        super().record(event)
        if (self._task, event) == ("one", "step 5") and "resumes" not in str(self.events[0]):
            os.kill(os.getpid(), signal.SIGKILL)


def child(rank: int, port: int, model_folder: Path, output: Path, deadly: bool) -> None:
    """One process of a run, with the environment that torchrun sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = run_config(model_folder, output, names=("one",), micro_batch_size=2)
    observer = Deadly() if deadly else Stopper()
    runner.run(config, data(), observer)
    output.with_name(f"{output.name}-{rank}.json").write_text(json.dumps(observer.events))


def launch(model_folder: Path, output: Path, deadly: bool) -> list[int]:
    """Runs two forks of this process; returns their exit codes. Kills one when the other dies, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [(rank, port, model_folder, output, deadly) for rank in range(2)]
    children = [context.Process(target=child, args=each) for each in arguments]
    for process in children:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in children])
    for process in children:
        process.join(10 if deadly else None)
        process.kill()
        process.join()
    return [process.exitcode for process in children]


def test_two_processes_resume_after_one_is_killed(tmp_path):
    """Each has its own part of every batch and its own dropout; both resume from the same state."""
    make_model("llama", tmp_path / "base")
    ends = json.loads(run_module(__name__, str(tmp_path)).splitlines()[-1])
    assert ends["whole"] == [0, 0] and ends["again"] == [0, 0]
    assert ends["killed"][0] == -signal.SIGKILL and ends["killed"][1] != 0
    events = json.loads((tmp_path / "ckpt-0.json").read_text())
    assert events[:2] == [["one", "resumes after training step 4 of 6"], ["one", "step 5"]]
    assert json.loads((tmp_path / "ckpt-1.json").read_text()) == []  # only the first one reports
    assert contents(tmp_path / "ckpt") == contents(tmp_path / "whole")
    assert sorted(contents(tmp_path / "ckpt")) == ["loraf.json", "statistics/one.safetensors", "tasks/one.safetensors"]


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    ends = {
        "whole": launch(folder / "base", folder / "whole", False),
        "killed": launch(folder / "base", folder / "ckpt", True),
        "again": launch(folder / "base", folder / "ckpt", False),
    }
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
