"""Two processes of a Trainer choose the same positions and train the same values as one, within rounding."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import torch

from loraf_train.peft import next_task
from tests.loraf_train.peft import toys
from tests.loraf_train.peft.test_trainers import trainer

WITHIN = 1e-5  # of values up to 0.1: sums are taken in another order


def train(folder: Path, output: Path, batch_size: int, name: str) -> None:
    """Trains two tasks, and writes their positions and values to a file."""
    torch.set_num_threads(1)
    model = toys.adapted(folder)
    # One batch holds all examples, so that every process count sees the same in each step.
    trainer(model, output, per_device_train_batch_size=batch_size).train()
    next_task(model, toys.config("two"), toys.batches(3))
    trainer(model, output, 50, per_device_train_batch_size=batch_size).train()
    names = ("default", "two")
    trained = {n: (toys.positions(model, n), toys.values(model, n)) for n in names}
    torch.save(trained, output / f"{name}.pt")


def child(rank: int, port: int, folder: Path, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(folder, output, 12, str(rank))


def test_two_processes_train_as_one(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(target=child, args=(rank, port, folder, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    train(folder, tmp_path, 24, "one")
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "0", "1"))
    for adapter, (positions, values) in one.items():
        for module in positions:
            assert torch.equal(first[adapter][0][module], positions[module])
            assert torch.equal(first[adapter][0][module], second[adapter][0][module])
            assert torch.equal(first[adapter][1][module], second[adapter][1][module])
            torch.testing.assert_close(first[adapter][1][module], values[module], rtol=0, atol=WITHIN)
