"""Compares training steps of this project's layer, PEFT LoRA, LoRA with a frozen A, and full fine-tuning.

    python benchmarks/training.py                # six to eight minutes on two quiet cores; writes results/training.json
    python benchmarks/training.py --rounds 2 --layers 2 --sequence 64 --out -
    python benchmarks/training.py --device cuda --shape mistral-7b --dtype bfloat16 --sequence 2048 --batch 1 --largest

All methods use the same weights, batch, optimizer (fused AdamW) and clipping. Each runs in its own process, so that its
memory is separate. They alternate, one step at a time, cell by cell in random order. Ratios are computed within a round
and reported as the median over rounds with a 95 % bootstrap interval. The first step of each cell is discarded. On a
GPU a method's model is built for its turn and freed after it, since not all fit at once.

Peak memory is that of steps only. On a CPU it is the peak of resident memory within a step, after trimming the heap,
minus the memory before the model was built. On a GPU it is the peak that torch allocated. On a CPU the rise of
allocated tensors within a step and its floating-point operations in matrix products are reported too, which depend on
neither the allocator nor the load. Full fine-tuning has no dropout, so it is measured once for all dropout values.

Checks before anything is timed: the gradient of the values equals that of PEFT's dense B, and of W times Aᵀ, at the
positions; autograd keeps as many bytes for the adapters as expected; all methods start with the same loss.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, interval, machine, memory  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "training.json"
BASELINE = "lora"
GPU_STEPS = 3  # per turn
EXACT = 1e-4  # relative, in float32


class Worker:
    """A method in this process. `serve` calls its public methods."""

    def __init__(self, name: str, setting):
        self.name = name
        self.setting = setting
        self.cuda = setting.device == "cuda"
        self.method = None

    def build(self) -> bool:
        from benchmarks.training_methods import Method

        self._before = 0 if self.cuda else _resident()
        self.method = Method(self.name, self.setting)
        return True

    def facts(self) -> dict[str, Any]:
        """Returns what does not depend on a cell, before any training."""
        from benchmarks.training_methods import Cell, make_batch

        self.method.prepare(Cell(1, 0.0, False))
        loss = float(self.method.loss(make_batch(self.setting, 1)).detach())
        trainable = sum(p.numel() for p in self.method.trainable)
        return {"first_loss": loss, "trainable": trainable, "file_bytes": self.method.file_bytes()}

    def free(self) -> None:
        import torch

        self.method = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def turn(self, cell, steps: int) -> list[float]:
        """Returns the seconds of each step."""
        import torch

        from benchmarks.training_methods import make_batch

        batch = make_batch(self.setting, cell.batch)
        self.method.prepare(cell)
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.method.step(batch)
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def costs(self, cell) -> dict[str, int]:
        """Returns a step's bytes (peak, rise of tensors, gradients, optimizer state) and its operations."""
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.turn(cell, 1)
            return {"peak_bytes": torch.cuda.max_memory_allocated()} | self.method.bytes()
        self.method.optimizer.zero_grad(set_to_none=True)
        _resident()
        Path("/proc/self/clear_refs").write_text("5")
        self.turn(cell, 1)
        peak = memory("VmHWM") - self._before
        self.method.optimizer.zero_grad(set_to_none=True)
        with _operations() as counted:
            rise = _rise_of_tensors(lambda: self.turn(cell, 1))
        return {"peak_bytes": peak, "rise_bytes": rise, "flops": counted.get_total_flops()} | self.method.bytes()

    def largest(self, cell) -> dict[str, float] | None:
        """Returns the largest power of two that fits as a batch, and its seconds per step; None if not even 1 fits."""
        import torch

        from benchmarks.training_methods import Cell

        best, batch = None, 1
        while True:
            tried = Cell(batch, cell.dropout, cell.checkpointing)
            try:
                best = {"batch": batch, "seconds": statistics.median(self.turn(tried, 1 + GPU_STEPS)[1:])}
            except torch.OutOfMemoryError:
                break
            batch *= 2
        self.method.optimizer.zero_grad(set_to_none=True)
        return best


def serve(connection: Connection, name: str, setting, threads: int) -> None:
    """Runs in a child process: calls methods of Worker until it receives None."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # otherwise torch's profiler logs each start and end
    import torch

    if threads:
        torch.set_num_threads(threads)
    worker = Worker(name, setting)
    while True:
        call = connection.recv()
        if call is None:
            return
        method, arguments = call
        try:
            connection.send((getattr(worker, method)(*arguments), None))
        except torch.OutOfMemoryError:
            worker.free()
            connection.send((None, "out of memory"))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {error}"))
            return


class Process:
    """The other end of `serve`."""

    def __init__(self, name: str, setting, threads: int):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, setting, threads), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments) -> Any:
        """Calls a method. Returns None if the device is out of memory. Raises RuntimeError for any other failure."""
        self._connection.send((what, arguments))
        answer, error = self._connection.recv()
        if error not in (None, "out of memory"):
            raise RuntimeError(f"{self.name}: {what}: {error}")
        return answer

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


class Run:
    """All rounds of all cells."""

    def __init__(self, processes: list[Process], cells: list, cuda: bool):
        self.processes = processes
        self.cells = cells
        self.cuda = cuda
        self.facts: dict[str, dict] = {}
        self.rounds: dict[tuple[str, Any], list[float | None]] = {}
        self.costs: dict[tuple[str, Any], dict | None] = {}
        self.largest: dict[tuple[str, Any], dict | None] = {}

    def cells_of(self, process: Process) -> list:
        return [cell for cell in self.cells if process.name != "full" or cell.dropout == self.cells[0].dropout]

    def begin(self) -> None:
        """Builds all models (on a GPU one after the other) and takes the first steps."""
        for process in self.processes:
            built = process.ask("build")
            self.facts[process.name] = process.ask("facts") if built else {}
            if self.cuda:
                process.ask("free")
                continue
            for cell in self.cells_of(process):
                process.ask("turn", cell, 1)

    def turn(self, process: Process, cell) -> float | None:
        """Returns the seconds of a step, or None if out of memory."""
        if not self.cuda:
            return process.ask("turn", cell, 1)[0]
        built = process.ask("build")
        times = process.ask("turn", cell, 1 + GPU_STEPS) if built else None
        process.ask("free")
        return statistics.median(times[1:]) if times else None

    def round(self, rng: random.Random) -> None:
        for cell in rng.sample(self.cells, len(self.cells)):
            participants = [process for process in self.processes if cell in self.cells_of(process)]
            for process in rng.sample(participants, len(participants)):
                self.rounds.setdefault((process.name, cell), []).append(self.turn(process, cell))

    def end(self, largest: bool) -> None:
        """Measures memory, and the largest batches if `largest`."""
        for process in self.processes:
            for cell in self.cells_of(process):
                built = process.ask("build") if self.cuda else True
                if built and self.cuda:
                    built = process.ask("turn", cell, 1)
                self.costs[process.name, cell] = process.ask("costs", cell) if built else None
                if largest and built:
                    self.largest[process.name, cell] = process.ask("largest", cell)
                if self.cuda:
                    process.ask("free")

    def table(self, tokens: int) -> list[dict]:
        """Returns a row for each method and cell.

        Args:
            tokens: of a sequence.
        """
        rows = []
        for (name, cell), seconds in self.rounds.items():
            row = {"method": name, "cell": cell.name, **asdict(cell)}
            times = [value for value in seconds if value is not None]
            if times:
                row["seconds"] = interval(times)
                row["tokens_per_second"] = interval([cell.batch * tokens / value for value in times])
            pairs = zip(seconds, self.rounds.get((BASELINE, cell), []), strict=False)
            ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
            row[f"seconds_to_{BASELINE}"] = interval(ratios) if ratios else None
            row["memory"] = self.costs.get((name, cell))
            if (name, cell) in self.largest:
                row["largest"] = self.largest[name, cell]
            rows.append(row)
        return rows


def verify(setting, methods: list[str]) -> dict[str, Any]:
    """Checks what must hold before anything is timed, and returns the numbers. Raises SystemExit if a check fails."""
    import torch

    from benchmarks.training_methods import (
        Setting,
        compare_gradients,
        expected_for_backward,
        kept_for_backward,
        state_bytes,
    )

    small = Setting(**vars(setting) | {"shape": "toy", "dtype": torch.float64, "device": "cpu", "sequence": 33})
    gradients = compare_gradients(small)
    if max(gradients.values()) > 1e-9:
        raise SystemExit(f"the gradients are not those of the dense formula: {gradients}")
    state = state_bytes(small)
    if any(measured != expected for measured, expected in state.values()):
        raise SystemExit(f"state is not proportional to K: {state}")
    kept: dict[str, dict] = {}
    for dropout in (0.0, 0.05):
        adapters = [name for name in methods if name != "full"]
        measured = {name: kept_for_backward(name, setting, dropout) for name in adapters}
        expected = expected_for_backward(setting, dropout)
        kept[f"dropout {dropout:g}"] = {"measured": measured, "arithmetic": expected}
        if measured.get("loraf", expected["loraf"]) != expected["loraf"]:
            raise SystemExit(f"the layer keeps {measured['loraf']} bytes a token, not {expected['loraf']}")
    return {
        "largest relative difference of gradients": gradients,
        "gradient and optimizer bytes at sparsity, as K says": {f"{s:g}": pair for s, pair in state.items()},
        "bytes kept for backward, a token and layer": kept,
    }


def _resident() -> int:
    """Returns the resident bytes of this process, after trimming its heap."""
    from loraf.system import trim_heap

    gc.collect()
    trim_heap()
    return memory("VmRSS")


def _operations():
    """Counts the operations of matrix products, including in-place ones, which torch leaves out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product(_, left, right, out_shape=None, **rest) -> int:
        """Of shapes (m, k) and (k, n)."""
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def _rise_of_tensors(work) -> int:
    """Returns the peak of tensor bytes during `work`, relative to its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def main(options: argparse.Namespace) -> dict:
    import peft
    import torch
    import transformers

    from benchmarks.training_methods import METHODS, Cell, Setting

    dtype = getattr(torch, options.dtype)
    methods = options.methods or [name for name in METHODS if name != "lora-half" or dtype != torch.float32]
    cuda = options.device == "cuda"
    setting = Setting(
        options.shape, dtype, options.device, options.rank, options.sparsity, options.sequence, options.layers
    )
    cells = [Cell(options.batch, dropout, again) for again in options.checkpointing for dropout in options.dropout]
    before = machine()
    held = verify(setting, methods)
    print(json.dumps(held, indent=1), file=sys.stderr, flush=True)
    run = Run([Process(name, setting, options.threads) for name in methods], cells, cuda)
    begin = time.perf_counter()
    run.begin()
    losses = {name: fact["first_loss"] for name, fact in run.facts.items() if fact}
    tolerance = EXACT if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    if max(losses.values()) - min(losses.values()) > tolerance * min(losses.values()):
        raise SystemExit(f"the methods do not begin with the same loss: {losses}")
    print(f"built and warm after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    rng = random.Random(1)
    for number in range(options.rounds):
        run.round(rng)
        text = f"round {number + 1} of {options.rounds} after {time.perf_counter() - begin:.0f} s"
        print(text, file=sys.stderr, flush=True)
    run.end(options.largest)
    for process in run.processes:
        process.end()
    return {
        "question": "what does a training step cost?",
        "commit": commit(),
        "machine": before | ({"gpu": torch.cuda.get_device_name()} if cuda else {}),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "setting": vars(setting) | {"dtype": options.dtype, "threads": options.threads or torch.get_num_threads()},
        "rounds": options.rounds,
        "held before": held,
        "methods": run.facts,
        "cells": run.table(options.sequence),
    }


def show(result: dict) -> None:
    print(f"{'method':<10} {'trainable':>13} {'file MB':>9}")
    for name, fact in result["methods"].items():
        if fact:
            print(f"{name:<10} {fact['trainable']:>13,} {fact['file_bytes'] / 1e6:>9.2f}")
    columns = (
        f"{'seconds':>8} {'to ' + BASELINE:>20} {'tok/s':>7} {'peak MB':>8} {'rise MB':>8} {'grad':>7} {'state':>7}"
    )
    print(f"{'method':<10} {'cell':<44} {columns}")
    for row in sorted(result["cells"], key=lambda row: row["cell"]):
        ratio, held = row[f"seconds_to_{BASELINE}"], row["memory"] or {}
        text = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})" if ratio else ""
        numbers = [held.get(f"{what}_bytes", 0) / 1e6 for what in ("peak", "rise", "gradient", "optimizer")]
        shown = f"{numbers[0]:>8.0f} {numbers[1]:>8.0f} {numbers[2]:>8.2f} {numbers[3]:>8.2f}"
        shown += f" {held.get('flops', 0) / 1e9:>8.1f}"
        seconds = f"{row['seconds']['median']:>8.3f}" if "seconds" in row else f"{'no room':>8}"
        speed = f"{row['tokens_per_second']['median']:>7.0f}" if "seconds" in row else f"{'':>7}"
        print(f"{row['method']:<10} {row['cell']:<44} {seconds} {text:>20} {speed} {shown}", row.get("largest", ""))


def parser() -> argparse.ArgumentParser:
    from benchmarks.training_methods import METHODS, SHAPES

    new = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--shape", choices=SHAPES, default="small")
    new.add_argument("--layers", type=int, help="instead of the shape's")
    new.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    new.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    new.add_argument("--rank", type=int, default=64)
    new.add_argument("--sparsity", type=float, default=0.9)
    new.add_argument("--sequence", type=int, default=256, help="tokens of an example")
    new.add_argument("--batch", type=int, default=4)
    new.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    new.add_argument("--checkpointing", type=int, choices=(0, 1), nargs="+", default=[0, 1])
    new.add_argument("--methods", nargs="+", choices=METHODS)
    new.add_argument("--rounds", type=int, default=7)
    new.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    new.add_argument("--largest", action="store_true", help="search the largest batch that a GPU has room for")
    new.add_argument("--out", default=str(RESULT), help="- writes no file")
    return new


if __name__ == "__main__":
    options = parser().parse_args()
    result = main(options)
    show(result)
    if options.out != "-":
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1, default=str) + "\n")
