"""Measures how long it takes to read and verify a checkpoint of Mistral-7B's shape and to build A.

    python benchmarks/load.py        about two minutes; writes benchmarks/results/load.json

The checkpoint is created in a temporary folder, without a model: 32 layers, seven projections, rank 64, ten tasks at
sparsity 0.9, bfloat16. Each measurement runs in its own process, alternating between the compiled library and NumPy.
Files are in the page cache. Packing for a kernel is not included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, memory, processor  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "load.json"
HIDDEN, KEY_VALUE, INTERMEDIATE = 4096, 1024, 14336  # Mistral-7B: (d_out, d_in) of a layer's projections
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_checkpoint(folder: Path, layers: int, rank: int, tasks: int, sparsity: float, seed: int = 0) -> None:
    """Creates a checkpoint with disjoint masks: of every `tasks` adjacent positions each task owns one, at random."""
    import torch

    from loraf.checkpoint import Checkpoint
    from loraf.manifest import BaseModel, positions_per_matrix
    from loraf.matrices.sparse import SparseB

    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    base = BaseModel("benchmark/mistral-7b-shape", "MistralForCausalLM", "0" * 64)
    checkpoint = Checkpoint.create(folder, base, rank, shapes, seed)
    generator = torch.Generator().manual_seed(seed)
    first = {  # the one of task 0 in each group; the other tasks follow it cyclically
        module: torch.randint(tasks, (positions_per_matrix(sparsity, d_out, rank),), generator=generator)
        for module, (d_out, _) in shapes.items()
    }
    for task in range(tasks):
        values = {}
        for module, (d_out, _) in shapes.items():
            k = len(first[module])
            positions = torch.arange(k) * tasks + (first[module] + task) % tasks
            drawn = torch.randn(k, generator=generator).to(torch.bfloat16)
            values[module] = SparseB.from_positions(positions, drawn, (d_out, rank))
        checkpoint.add_task(f"task{task}", values, alpha=float(rank), sparsity=sparsity)


def measure(folder: Path) -> dict:
    """Returns the measurements of one process, in seconds and bytes."""
    import torch

    from loraf.checkpoint import Checkpoint
    from loraf.matrices import native, projection

    projection.normal_table()  # read once per process
    if (os.environ.get(native.SWITCH) != "0") != (native.library() is not None):
        raise SystemExit(f"the compiled library is not used: {native.why_not()}")
    before = memory("VmRSS")
    results: dict = {}

    def timed(step: str, call: Callable):
        start, used = time.perf_counter(), time.process_time()
        result = call()
        results[step] = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
        return result

    checkpoint = timed("open", partial(Checkpoint.open, folder))
    results["open"]["peak_bytes"] = memory("VmHWM") - before
    a = timed("A in bfloat16, not known", partial(checkpoint.projections, dtype=torch.bfloat16))
    results["peak_bytes"] = memory("VmHWM") - before
    results["kept_bytes"] = checkpoint.nbytes + sum(tensor.nbytes for tensor in a.values())
    del a
    timed("A in bfloat16, known", partial(checkpoint.projections, dtype=torch.bfloat16))
    timed("verify A, known", checkpoint.verify_projection)
    projection.forget_digests()
    timed("verify A, not known", checkpoint.verify_projection)
    del checkpoint
    timed("open again", partial(Checkpoint.open, folder))
    library = native.library()
    results["library"] = f"compiled, {library.variant}" if library else f"NumPy ({native.why_not()})"
    return results


def summary(runs: list[dict]) -> dict:
    """Returns medians, and the extremes of the wall-clock time."""
    steps = [key for key, value in runs[0].items() if isinstance(value, dict)]
    result: dict = {"library": runs[0]["library"], "runs": len(runs)}
    for step in steps:
        seconds = [run[step]["seconds"] for run in runs]
        used = statistics.median(run[step]["processor_seconds"] for run in runs)
        result[step] = {
            "median_s": round(statistics.median(seconds), 4),
            "fastest_s": round(min(seconds), 4),
            "slowest_s": round(max(seconds), 4),
            "processor_s": round(used, 4),
        }
    for known in ("known", "not known"):
        totals = [run["open"]["seconds"] + run[f"A in bfloat16, {known}"]["seconds"] for run in runs]
        result[f"open and A in bfloat16, {known}"] = {"median_s": round(statistics.median(totals), 4)}
    result["peak_mb_while_opening"] = round(statistics.median(run["open"]["peak_bytes"] for run in runs) / 1e6)
    result["peak_mb"] = round(statistics.median(run["peak_bytes"] for run in runs) / 1e6)
    result["kept_mb"] = round(runs[0]["kept_bytes"] / 1e6)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the checkpoint to measure, in a child process
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return

    import numpy
    import torch

    from loraf.system import processors

    before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ckpt"
        start = time.perf_counter()
        make_checkpoint(folder, options.layers, options.rank, options.tasks, options.sparsity)
        print(f"created in {time.perf_counter() - start:.1f} s", flush=True)
        runs: dict[str, list[dict]] = {"1": [], "0": []}
        for _ in range(options.rounds):
            for switch, measurements in runs.items():
                command = [sys.executable, __file__, "--measure", str(folder)]
                environment = os.environ | {"LORAF_NATIVE": switch}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                measurements.append(json.loads(done.stdout))
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    record = {
        "question": __doc__.splitlines()[0],
        "processor": processor(),
        "threads": processors(),
        "load_average": {"before": before, "after": round(os.getloadavg()[0], 2)},  # over the last minute
        "commit": commit(),
        "versions": {"python": platform.python_version(), "numpy": numpy.__version__, "torch": torch.__version__},
        "shape": {key: getattr(options, key) for key in ("layers", "rank", "tasks", "sparsity")},
        "task_files_mb": round(size / 1e6),
        "compiled": summary(runs["1"]),
        "numpy": summary(runs["0"]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
