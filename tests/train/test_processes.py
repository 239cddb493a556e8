"""Two processes train what one trains: the batch is divided, not doubled, and only one of them writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf_train import sequence
from tests.standins import make_model
from tests.train import toys

ROOT = Path(__file__).parents[2]


class Counter(sequence.Observer):
    def __init__(self):
        self.losses = []

    def step(self, loss, lr, step, total):
        self.losses.append(loss)


def run(model_folder: Path, output: Path) -> tuple[list[float], Checkpoint]:
    tasks = [
        toys.task("one", sparsity=0.7, training={"batch_size": 6}),
        toys.task("two", calibration={"optimizer": "sgd"}, training={"micro_batch_size": 2, "packing": True}),
    ]
    counter = Counter()
    checkpoint = sequence.run(
        toys.run_config(model_folder, output, *tasks), {"one": toys.data(3), "two": toys.data(50)}, counter
    )
    return counter.losses, checkpoint


def child(rank: int, port: int, model_folder: Path, output: Path) -> None:
    """What torchrun sets, and nothing else."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    losses, checkpoint = run(model_folder, output)
    answer = {"losses": losses, "manifest": checkpoint.manifest.to_json()}
    output.with_name(f"answer-{rank}.json").write_text(json.dumps(answer))


def launch(model_folder: Path, output: Path) -> int:
    """Two forks of this process: one import of torch for both, and no threads of other tests."""
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank, port, model_folder, output)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    return max(abs(process.exitcode) for process in children)


def test_two_processes_end_with_what_one_ends_with(tmp_path):
    model_folder = make_model("llama", tmp_path / "model")
    command = [sys.executable, "-m", __name__, str(model_folder), str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"answer-{rank}.json").read_text()) for rank in range(2)]
    losses, alone = run(model_folder, tmp_path / "one")
    together = Checkpoint.open(tmp_path / "two")
    assert len(losses) == 8 and found[1]["losses"] == []  # only the first reports
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-5)
    assert found[0]["manifest"] == found[1]["manifest"] == together.manifest.to_json()
    assert together.manifest.task("two").training["processes"] == 2
    for name, modules in alone.tasks.items():
        for module, b in modules.items():
            other = together.tasks[name][module]
            assert torch.equal(other.flat, b.flat)
            torch.testing.assert_close(other.values, b.values, rtol=0.02, atol=1e-4)


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), Path(sys.argv[2])))
