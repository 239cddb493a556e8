"""Measures the time that the delta adds to a step for each kernel, compared with the products of the base model.

    python benchmarks/kernels.py                        # everything, into results/kernels.json
    python benchmarks/kernels.py --shape small --rows 16 --tasks 4 --threads 1 --out -

A step goes through the layers of the model: the base product of a layer (which also evicts A and B from the caches, as
in an engine), then the delta, timed separately. Kernels alternate between repetitions. Reports medians and quartiles.
Only the operators are measured; an engine adds its own dispatch to both sides.

Tried and rejected, each compared with the present kernel (one core of an Ice Lake server without BF16 or AMX, others
busy, the 8-layer shape, four tasks, milliseconds per step unless stated otherwise; best of many):

    shrink, 16 rows: 16 rows × 1 block of A in registers 2.1, 8 rows × 2 blocks (chosen) 1.5
    shrink, 1 row: one block with four sums along k 0.44, four blocks (chosen) 0.38
    shrink, cold, one layer: prefetching A 1 KiB ahead (chosen) 26 µs for one row, 64 µs for 16; prefetching the next
        blocks during the products 32 and 60 µs; 4 KiB ahead, huge pages: no difference
    expand: a table of w · z for every task and one sparse row for all tasks (not built: sorting rows by length needs
        separate tasks, with which weights cost nothing and unused tasks are skipped)
    expand, 16 rows, per nonzero: columns read one by one 1.25 ns, eight per word (chosen) 1.13; columns widened to
        16 bits and scaled beforehand 1.33; values broadcast from registers by shuffles about 1.9
    expand, 1 row: rows in the lanes 2.3, outputs in the lanes (chosen) 0.6; 4 rows: 2.5 and 1.4
    torch kernel, 3,584 outputs, 16 rows: embedding_bag (chosen) 183 µs, sparse CSR 186 µs, dense side by side 743 µs
    many rows by dense products in torch, one layer, 512 rows, all four tasks: the native kernel 18 ms (64 rows: 1.6);
        float32 with a single set's B 31 ms (3.9), bfloat16 43 ms (5.9), so there is no threshold. A processor with AMX
        would multiply A faster than the native shrink: not tried
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, instructions, processor  # noqa: E402
from loraf.matrices.sparse import SparseB  # noqa: E402
from loraf_serve.kernels import BatchWeights, Part, prepare, why_not_native  # noqa: E402

RANK, SPARSITY = 64, 0.9
# hidden, intermediate, rows of q and of k and v, layers
SHAPES = {
    "small": (1024, 2688, 1024, 256, 8),  # 87 M parameters: 8 layers, 16 heads of 64, 4 for keys and values
    "mistral-7b-layer": (4096, 14336, 4096, 1024, 1),
}
KERNELS = ("native", "torch")
FEW = 100  # rows; with fewer, a base product precedes every delta
RESULTS = Path(__file__).parent / "results" / "kernels.json"


def fused_layers(shape: str) -> list[tuple[int, list[int]]]:
    """Returns (d_in, d_out of each part) of the four fused products of a decoder layer."""
    hidden, intermediate, q, kv, _ = SHAPES[shape]
    return [(hidden, [q, kv, kv]), (q, [hidden]), (hidden, [intermediate, intermediate]), (intermediate, [hidden])]


def random_part(d_in: int, d_out: int, tasks: int, offset: int, dtype: torch.dtype) -> Part:
    """Draws disjoint masks, each of 1 − SPARSITY of the positions."""
    size = d_out * RANK
    count = min(round(size * (1 - SPARSITY)), size // tasks)
    shuffled = torch.randperm(size)[: tasks * count].view(tasks, count)
    matrices = [
        SparseB.from_positions(positions, torch.randn(count).mul_(0.02).to(dtype), (d_out, RANK))
        for positions in shuffled
    ]
    return Part((torch.randn(RANK, d_in) / d_in**0.5).to(dtype), matrices, 0, d_out, offset)


class Model:
    """Base weights and operands of all layers."""

    def __init__(self, shape: str, tasks: int, dtype: torch.dtype, kernels: tuple[str, ...]):
        self.layers = []
        self.nbytes = dict.fromkeys(kernels, 0)
        self.seconds_to_prepare = dict.fromkeys(kernels, 0.0)
        for _ in range(SHAPES[shape][-1]):
            for d_in, outs in fused_layers(shape):
                offsets = [0, *itertools.accumulate(outs)]
                parts = [random_part(d_in, o, tasks, at, dtype) for o, at in zip(outs, offsets[:-1], strict=True)]
                operands = {}
                for kernel in kernels:
                    begin = time.perf_counter()
                    operands[kernel] = prepare(parts, kernel)
                    self.seconds_to_prepare[kernel] += time.perf_counter() - begin
                    self.nbytes[kernel] += operands[kernel].nbytes
                self.layers.append((torch.randn(offsets[-1], d_in).to(dtype), operands))

    def step(
        self, xs: dict[int, torch.Tensor], kernel: str | None, rows: BatchWeights, base: bool
    ) -> tuple[float, float]:
        """Returns the seconds of the base products (0 without `base`) and of the deltas (0 without a kernel)."""
        products = deltas = 0.0
        for weight, operands in self.layers:
            x = xs[weight.shape[1]]
            begin = time.perf_counter()
            y = torch.nn.functional.linear(x, weight) if base else x.new_zeros(len(x), len(weight))
            middle = time.perf_counter()
            products += (middle - begin) * base
            if kernel:
                operands[kernel].add_delta(y, x, rows)
                deltas += time.perf_counter() - middle
        return products, deltas


def rows_of(n: int, sets: int, tasks: int) -> BatchWeights:
    """Assigns n rows in turn to `sets` random task sets. A single set is the first task alone."""
    if sets == 1:
        table = torch.eye(tasks)[:1]
    else:
        # Each set has a task with probability ½, and none is empty.
        table = (torch.rand(sets, tasks) < 0.5).float()
        table[torch.arange(sets), torch.arange(sets) % tasks] = 1
    return BatchWeights(torch.arange(n, dtype=torch.int32), (table[torch.arange(n) % sets] * 2.0).contiguous())


def spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": round(middle * 1e3, 4), "quartiles_ms": [round(low * 1e3, 4), round(high * 1e3, 4)]}


@torch.no_grad()
def measure(model: Model, shape: str, n: int, rows: BatchWeights, kernels, dtype, repeat: int) -> dict[str, dict]:
    xs = {d_in: torch.randn(n, d_in).to(dtype) for d_in, _ in fused_layers(shape)}
    deltas = {kernel: [] for kernel in kernels}
    bases = []
    for turn in range(repeat + 1):
        for kernel in kernels or [None]:
            # With many rows a step is bound by compute, not memory, and a base step takes seconds: two are enough.
            base = n < FEW or (turn < 2 and kernel in (None, *kernels[:1]))
            product, delta = model.step(xs, kernel, rows, base)
            if base and (turn or n >= FEW):  # the first turn warms up
                bases.append(product)
            if kernel and turn:
                deltas[kernel].append(delta)
    return {"base": spread(bases)} | {kernel: spread(values) for kernel, values in deltas.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 512])
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 10])
    parser.add_argument("--sets", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS))
    parser.add_argument("--repeat", type=int, default=9, help="steps of each kernel; a third for 100 rows and more")
    parser.add_argument("--out", default=str(RESULTS), help="a file, or - for the standard output")
    options = parser.parse_args(arguments)
    if "native" in options.kernels and (why := why_not_native()):
        parser.error(f"no native kernel: {why}")
    torch.manual_seed(0)
    record = {
        "commit": commit(),
        "processor": {"model": processor(), "cores": str(os.cpu_count()), "flags": " ".join(instructions())},
        "torch": torch.__version__,
        "rank": RANK,
        "sparsity": SPARSITY,
        "runs": [],
    }
    if "native" in options.kernels:
        record["variant"] = prepare([random_part(16, 16, 1, 0, torch.float32)], "native").variant
    for shape, tasks, dtype in itertools.product(options.shape, options.tasks, (torch.bfloat16, torch.float32)):
        full = dtype == torch.bfloat16  # in float32 only the base, once, for comparison
        if not full and tasks != options.tasks[0]:
            continue
        torch.set_num_threads(1)
        kernels = tuple(options.kernels) if full else ()
        model = Model(shape, tasks, dtype, kernels)
        for threads, n, sets in itertools.product(options.threads, options.rows, options.sets if full else [1]):
            if sets > n:
                continue
            torch.set_num_threads(threads)
            repeat = options.repeat if n < FEW else max(3, options.repeat // 3)
            times = measure(model, shape, n, rows_of(n, sets, tasks), kernels, dtype, repeat)
            run = {"shape": shape, "dtype": str(dtype)[6:], "tasks": tasks, "threads": threads, "rows": n, "sets": sets}
            run |= {"times": times}
            if full:
                run |= {"nbytes": model.nbytes}
                run |= {"prepare_seconds": {k: round(v, 3) for k, v in model.seconds_to_prepare.items()}}
            record["runs"].append(run)
            if options.out != "-":  # after each, so that an interrupted run leaves results
                Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            figures = "  ".join(f"{name} {value['ms']:9.3f}" for name, value in times.items())
            print(
                *(f"{key}={run[key]}" for key in list(run)[:6]), "| ms per step:", figures, file=sys.stderr, flush=True
            )
    if options.out == "-":
        print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
