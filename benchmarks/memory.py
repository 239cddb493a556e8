"""Measures the memory that task sets and further checkpoints take in vLLM's worker.

    python benchmarks/memory.py          # about five minutes on two cores; writes results/memory.json

Uses the model and checkpoints of benchmarks/serving.py and the backend `resident`, eager. The first requests touch
pages of the KV cache and scratch memory for the first time, so requests of both kinds run until the worker stops
growing. Then rounds of 64 requests with one set alternate with rounds of 64 requests with 64 new sets. Memory is what
the worker does not share with other processes (USS).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.engines import Ours  # noqa: E402
from benchmarks.measuring import commit, interval, machine  # noqa: E402
from benchmarks.serving import PROMPT, Cell, make_model  # noqa: E402
from tests.standins import random_checkpoint  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "memory.json"
REQUESTS, TOKENS, RANK = 64, 2, 64
KV_BYTES = 128 << 20
CALM, MOST = 4, 40  # warm-up ends after so many rounds in a row that change less than 0.25 MB; maximum
OPTIONS = ("--kv-cache-memory-bytes", str(KV_BYTES), "--no-enable-prefix-caching")
MB = 1e6


async def main(arguments: argparse.Namespace) -> dict:
    import vllm

    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="loraf-memory-") as folder:
        root = Path(folder)
        model = make_model(root / "model")
        size_of_a = a_bytes(model, arguments.dtype)
        checkpoints = []
        for i in range(4):
            checkpoints.append(root / f"c{i}")
            random_checkpoint(checkpoints[i], model, ["t0", "t1", "t2", "t3"], RANK, 0.9, seed=i, std=0.02)
        engine = Ours("resident", model, False, arguments.dtype, kind="resident", more=OPTIONS)
        await engine.start({"T4": checkpoints[0]})

        async def ask(sets: int, fresh: bool = False) -> None:
            cell = Cell(REQUESTS, sets, tokens=TOKENS, fresh=fresh)
            prompts = [[rng.randrange(3, 259) for _ in range(PROMPT)] for _ in range(REQUESTS)]
            await engine.ask("T4", cell.task_sets(rng), prompts, TOKENS)

        try:
            blocks = engine.engine().vllm_config.cache_config.num_gpu_blocks
            calm = warm_up = 0
            while calm < CALM:
                before = engine.worker_bytes()
                await ask(REQUESTS if warm_up % 2 else 1, fresh=bool(warm_up % 2))
                calm = calm + 1 if abs(engine.worker_bytes() - before) < MB / 4 else 0
                warm_up += 1
                if warm_up == MOST:
                    raise SystemExit(f"the worker still grew after {MOST} rounds of {REQUESTS} requests")
            growth: dict[str, list[float]] = {"one set": [], "64 sets never named before": []}
            for _ in range(arguments.rounds):
                for kind, sets, fresh in (("one set", 1, False), ("64 sets never named before", REQUESTS, True)):
                    before = engine.worker_bytes()
                    await ask(sets, fresh)
                    growth[kind].append((engine.worker_bytes() - before) / MB)
            further = []
            for i in range(1, 4):
                before = engine.worker_bytes()
                await engine.load(f"c{i}", checkpoints[i])
                held = engine.backend.adapter_bytes(engine.adapters[f"c{i}"])
                grown = engine.worker_bytes() - before
                further.append({"held_mb": round(held / MB, 2), "worker_grew_mb": round(grown / MB, 2)})
        finally:
            await engine.stop()
    return {
        "question": __doc__.splitlines()[0],
        "machine": machine(),
        "commit": commit(),
        "vllm": vllm.__version__,
        "dtype": arguments.dtype,
        "kv_blocks": blocks,
        "warm-up, rounds": warm_up,
        "growth in MB of a round of 64 requests": {what: interval(values) for what, values in growth.items()},
        "each round": {what: [round(value, 3) for value in values] for what, values in growth.items()},
        "growth in MB of all rounds": {what: round(sum(values), 3) for what, values in growth.items()},
        "sets never named before, in all": REQUESTS * arguments.rounds,
        "further checkpoints": further,
        "A of a checkpoint, MB": round(size_of_a / MB, 2),
    }


def a_bytes(model: Path, dtype: str) -> int:
    from tests.standins import linear_shapes

    return sum(RANK * d_in for _, d_in in linear_shapes(model).values()) * (4 if dtype == "float32" else 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default=str(RESULT), help="- writes no file")
    options = parser.parse_args()
    result = asyncio.run(main(options))
    print(json.dumps(result, indent=1))
    if options.out != "-":
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
