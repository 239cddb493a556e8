"""Measures how soon a checkpoint of Mistral-7B's shape is ready to serve, and how loading it delays running streams.

    python benchmarks/ready.py               # two parts, one engine each; writes results/ready.json
    python benchmarks/ready.py --parts beside --layers-beside 2 --out -

idle     An engine with all 32 layers (random weights, 15 GB in bfloat16). A checkpoint of ten tasks, rank 64, is passed
         to the backend, as LoadAdapter does after locating the folder, until a request may name it. Each round has
         another seed: first with an A that the worker has never computed, then again after a drop, with A's digest
         cached. The very first load is reported separately. The cost of new memory is measured too: a load allocates
         what it holds, which may be expensive in a virtual machine.
beside   An engine with few layers of the same widths, so that a step is short, and streams that run all the time.
         Checkpoints with as few layers are loaded one after the other, in total as much as a whole one. Compares the
         gaps between tokens during loads with those without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.engines import Ours  # noqa: E402
from benchmarks.load import HIDDEN, INTERMEDIATE, KEY_VALUE, make_checkpoint  # noqa: E402
from benchmarks.measuring import commit, interval, machine, memory  # noqa: E402
from loraf.system import pages  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "ready.json"
LAYERS, RANK, TASKS, SPARSITY = 32, 64, 10, 0.9
STREAMS, PROMPT = 2, 16
PAUSE = 1.5  # between two loads: vLLM's processes busy-wait for a second after each call
QUIET_SECONDS = 10.0  # without a load, before the first and between two
OPTIONS = ("--load-format", "dummy", "--max-model-len", "2048", "--max-num-batched-tokens", "64")
OPTIONS += ("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(1 << 30))


def make_model(folder: Path, layers: int) -> Path:
    """Writes Mistral-7B's config with a small vocabulary and no weights. The engine fills in random ones."""
    import transformers

    from tests.standins import byte_tokenizer

    config = transformers.MistralConfig(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=KEY_VALUE // 128,
        head_dim=128,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["MistralForCausalLM"],
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


async def idle(folder: Path, layers: int, dtype: str, rounds: int) -> dict:
    """Measures seconds until ready in an idle engine, loading each checkpoint twice with a drop between."""
    checkpoints = [folder / f"ckpt{seed}" for seed in range(rounds + 1)]
    for seed, checkpoint in enumerate(checkpoints):
        make_checkpoint(checkpoint, layers, RANK, TASKS, SPARSITY, seed)
    engine = Ours("resident", make_model(folder / "model", layers), False, dtype, kind="resident", more=OPTIONS)
    await engine.start({})
    try:
        seconds = []
        for checkpoint in checkpoints:
            for _ in range(2):
                begin = time.perf_counter()
                await engine.load("ckpt", checkpoint)
                seconds.append(round(time.perf_counter() - begin, 3))
                held = engine.backend.adapter_bytes(engine.adapters["ckpt"])
                await engine.backend.remove_adapter(engine.adapters["ckpt"])
                await asyncio.sleep(PAUSE)
        new_memory = touch_seconds()
    finally:
        await engine.stop()
    return {
        "layers": layers,
        "task_files_mb": round(sum(f.stat().st_size for f in checkpoints[0].rglob("*.safetensors")) / 1e6),
        "held_mb": round(held / 1e6),
        "new memory, s per GB": new_memory,
        "ready_s, the engine's first": seconds[0],
        "ready_s, A not known": interval(seconds[2::2]),
        "ready_s, A known": interval(seconds[3::2]),
    }


def touch_seconds() -> float:
    """Returns the seconds per GB that one thread takes to touch new memory, with the engine's model in memory."""
    memory = pages(1 << 30)
    begin = time.perf_counter()
    memory.numpy()[:: mmap.PAGESIZE] = 1
    return round((time.perf_counter() - begin) / (len(memory) / 1e9), 2)


async def beside(folder: Path, layers: int, dtype: str, rounds: int) -> dict:
    """Measures the gaps between the tokens of running streams, with and without a concurrent load."""
    loads = LAYERS // layers
    for i in range(loads + 1):
        make_checkpoint(folder / f"ckpt{i}", layers, RANK, TASKS, SPARSITY, seed=i)
    engine = Ours("resident", make_model(folder / "model", layers), False, dtype, kind="resident", more=OPTIONS)
    await engine.start({"old": folder / f"ckpt{loads}"})
    rng = random.Random(0)
    times: list[list[float]] = [[] for _ in range(STREAMS)]

    async def stream(number: int, task_set: str) -> None:
        while True:
            prompt = [rng.randrange(3, 259) for _ in range(PROMPT)]
            async for new in engine.pieces("old", task_set, prompt, 2048 - PROMPT - 1):
                times[number] += [time.perf_counter()] * bool(new)

    async def load_all() -> tuple[float, float]:
        begin = time.perf_counter()
        for i in range(loads):
            await engine.load(f"new{i}", folder / f"ckpt{i}")
        end = time.perf_counter()
        for i in range(loads):
            await engine.backend.remove_adapter(engine.adapters[f"new{i}"])
        return begin, end

    running = [asyncio.create_task(stream(i, "base" if i % 2 else "all")) for i in range(STREAMS)]
    windows = []
    try:
        await asyncio.sleep(2.0)
        for _ in range(rounds):
            await asyncio.sleep(QUIET_SECONDS)
            windows.append(await load_all())
        await asyncio.sleep(QUIET_SECONDS)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await engine.stop()
    return {
        "layers": layers,
        "checkpoints loaded in a row": loads,
        "streams": STREAMS,
        "seconds of all loads of a round": interval([round(end - begin, 3) for begin, end in windows]),
        **gaps(times, windows),
    }


def gaps(times: list[list[float]], windows: list[tuple[float, float]]) -> dict:
    """Returns the milliseconds between tokens of a stream; `while loading` where the gap overlaps a load."""
    by_state: dict[str, list[float]] = {"quiet": [], "while loading": []}
    # The longest gap of each load and of each time between two, since the machine itself may delay a token.
    longest: dict[tuple[str, int], float] = defaultdict(float)
    for stream in times:
        for a, b in zip(stream, stream[1:], strict=False):
            touched = [i for i, (begin, end) in enumerate(windows) if a < end and b > begin]
            when = "while loading" if touched else "quiet"
            by_state[when].append(1e3 * (b - a))
            part = when, touched[0] if touched else sum(end < a for _, end in windows)
            longest[part] = max(longest[part], 1e3 * (b - a))
    usual = statistics.median(by_state["quiet"])
    shown: dict = {}
    for name, values in by_state.items():
        values.sort()
        shown[f"gaps_ms, {name}"] = {
            "n": len(values),
            "median": round(statistics.median(values), 1),
            "p99": round(values[int(0.99 * (len(values) - 1))], 1),
            "longest": round(values[-1], 1),
        }
    for name in by_state:
        delays = [round(value - usual, 1) for (when, _), value in sorted(longest.items()) if when == name]
        shown[f"longest delay of a token, {name}, ms"] = interval(delays) | {"each": delays}
    return shown


async def main(arguments: argparse.Namespace) -> dict:
    import vllm

    result: dict = {
        "question": __doc__.splitlines()[0],
        "machine": machine(),
        "commit": commit(),
        "vllm": vllm.__version__,
        "dtype": arguments.dtype,
        "rank": RANK,
        "tasks": TASKS,
        "sparsity": SPARSITY,
    }
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="loraf-ready-") as folder:
            if part == "idle":
                result[part] = await idle(Path(folder), arguments.layers, arguments.dtype, arguments.rounds)
            else:
                result[part] = await beside(Path(folder), arguments.layers_beside, arguments.dtype, arguments.rounds)
    result["service_peak_mb"] = round(memory("VmHWM") / 1e6)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("idle", "beside"), default=("idle", "beside"))
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the part `idle`")
    parser.add_argument("--layers-beside", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default=str(RESULT), help="- writes no file")
    options = parser.parse_args()
    result = asyncio.run(main(options))
    print(json.dumps(result, indent=1))
    if options.out != "-":
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
