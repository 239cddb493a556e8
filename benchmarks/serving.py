"""Measures throughput and latency with task sets, compared with plain vLLM, all engines in one run.

    python benchmarks/serving.py                 # about 20 minutes on two cores; writes results/serving.json
    python benchmarks/serving.py --rounds 3 --engines plain-eager resident-eager --out -

Every engine is started once. Each round runs every cell of every engine once, in random order. Ratios are computed
within a round and reported as the median over rounds with a 95 % bootstrap interval. The model has Mistral's
architecture (8 layers, 1,024 wide, 87 M random parameters). The checkpoints have rank 64, sparsity 0.9, random masks
and values, and two, four or ten tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.engines import Engine, Merged, Ours, Plain, Stock, Timing  # noqa: E402
from benchmarks.measuring import commit, interval, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "serving.json"
PROMPT, TOKENS = 24, 32
TASKS = (2, 4, 10)
ENGINES = ("plain-eager", "plain-compiled", "stock-eager", "slots-eager", "resident-eager", "resident-compiled")
ENGINES += ("merged-eager",)


@dataclass(frozen=True)
class Cell:
    """One workload.

    Attributes:
        batch: number of concurrent requests.
        sets: number of distinct task sets among them; 0: the base model.
        tasks: of the checkpoint.
        base: number of requests for the base model.
        tokens: new tokens of each response.
        fresh: draw new sets each time, which the engine has never seen.
    """

    batch: int
    sets: int
    tasks: int = 4
    base: int = 0
    tokens: int = TOKENS
    fresh: bool = False

    @property
    def name(self) -> str:
        sets = f"{self.sets} sets" if self.sets != 1 else "1 set"
        sets = "base" if self.sets == 0 else sets + (" never seen" if self.fresh else "")
        mixed = f", {self.base} base rows" if self.base else ""
        return f"{self.batch} requests of {self.tokens} tokens, {sets}{mixed}, T={self.tasks}"

    def task_sets(self, rng: random.Random) -> list[str]:
        """Returns the task set of each request."""
        source = rng if self.fresh else random.Random(self.sets)
        names = [f"t{i}" for i in range(self.tasks)]
        texts = ["all"] if self.sets == 1 and not self.fresh else []
        while len(texts) < self.sets:
            texts.append("+".join(f"{name}:{source.uniform(0.1, 2):.6f}" for name in names))
        of_requests = [texts[i % len(texts)] if texts else "base" for i in range(self.batch)]
        return ["base" if i < self.base else text for i, text in enumerate(of_requests)]


BASE = [Cell(batch, 0) for batch in (1, 4, 16, 32)]
LATENCY = [Cell(64, 0, tokens=8), Cell(64, 1, tokens=8), Cell(64, 64, tokens=8)]
SINGLE = [Cell(1, 1, tokens=4), Cell(1, 1, tokens=4, fresh=True)]
OURS = [
    Cell(16, 0),
    *(Cell(batch, 1) for batch in (1, 4, 16, 32)),
    *(Cell(4, 4), Cell(16, 4), Cell(16, 16), Cell(32, 16), Cell(32, 32), Cell(16, 8, base=8)),
    *(Cell(16, sets, tasks) for tasks in (2, 10) for sets in (1, 16)),
    *LATENCY,
    *SINGLE,
]
CELLS = {
    "plain-eager": [*BASE, LATENCY[0]],
    "plain-compiled": [*BASE, LATENCY[0]],
    "stock-eager": [Cell(16, 0), Cell(16, 1), Cell(16, 4)],
    "slots-eager": [Cell(16, 0), Cell(1, 1), Cell(16, 1), Cell(16, 4), Cell(16, 16), *LATENCY[1:], *SINGLE],
    "merged-eager": [Cell(16, 0), Cell(1, 1), Cell(16, 1), Cell(16, 4), Cell(16, 16)],
    "resident-eager": OURS,
    "resident-compiled": OURS,
}
SLOW = {"stock-eager"}  # every third round only
SETTLE_SECONDS = (
    1.2  # vLLM's processes busy-wait for a second after their last work, which would disturb another engine
)
REPEAT = dict.fromkeys(SINGLE, 10)  # within a round


@dataclass
class Measured:
    """One cell of one engine in one round."""

    tokens_per_second: float
    first_token: float  # median over requests, seconds
    between_tokens: float  # median over tokens, seconds

    @classmethod
    def of(cls, timings: Sequence[Timing], cell: Cell) -> Measured:
        gaps = [gap for timing in timings for gap in timing.between]
        return cls(
            cell.batch * cell.tokens / max(timing.total for timing in timings),
            statistics.median(timing.first for timing in timings),
            statistics.median(gaps),
        )


def make_model(folder: Path) -> Path:
    import torch
    import transformers

    from tests.standins import byte_tokenizer

    config = transformers.MistralConfig(
        vocab_size=320,
        hidden_size=1024,
        intermediate_size=2688,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_checkpoints(root: Path, model: Path) -> dict[str, Path]:
    from tests.standins import random_checkpoint

    checkpoints = {}
    for count in TASKS:
        names = [f"t{i}" for i in range(count)]
        random_checkpoint(root / f"T{count}", model, names, 64, 0.9, seed=count, alphas=(64.0,), std=0.02)
        checkpoints[f"T{count}"] = root / f"T{count}"
    return checkpoints


def make_engines(names: Sequence[str], model: Path, folder: Path, dtype: str) -> list[Engine]:
    engines: list[Engine] = []
    for name in names:
        kind, _, mode = name.partition("-")
        arguments = (name, model, mode == "compiled", dtype)
        if kind == "plain":
            engines.append(Plain(*arguments))
        elif kind == "stock":
            sets = {text for cell in CELLS[name] for text in cell.task_sets(random.Random(0)) if text != "base"}
            engines.append(Stock(*arguments, sets={"T4": sorted(sets)}, folder=folder))
        else:
            engines.append((Merged if kind == "merged" else Ours)(*arguments, kind=kind))
    return engines


class Run:
    """All rounds."""

    def __init__(self, engines: list[Engine], only: str, say: Callable[[str], None]):
        self.engines = engines
        self.cells = [(e, cell) for e in engines for cell in CELLS[e.name] if re.search(only, cell.name)]
        self.say = say
        self.rng = random.Random(1)
        self.rounds: dict[tuple[str, Cell], list[Measured | None]] = {}

    async def cell(self, engine: Engine, cell: Cell) -> Measured:
        results = []
        for _ in range(REPEAT.get(cell, 1)):
            prompts = [[self.rng.randrange(3, 259) for _ in range(PROMPT)] for _ in range(cell.batch)]
            timings = await engine.ask(f"T{cell.tasks}", cell.task_sets(self.rng), prompts, cell.tokens)
            results.append(Measured.of(timings, cell))
        return Measured(*(statistics.median(values) for values in zip(*map(astuple, results), strict=True)))

    async def round(self, number: int, rounds: int) -> None:
        work = self.rng.sample(self.cells, len(self.cells))
        begin = time.perf_counter()
        for engine, cell in work:
            await asyncio.sleep(SETTLE_SECONDS)
            left_out = engine.name in SLOW and number % 3
            measured = None if left_out else await self.cell(engine, cell)
            self.rounds.setdefault((engine.name, cell), []).append(measured)
        self.say(f"round {number + 1} of {rounds}: {time.perf_counter() - begin:.0f} s")

    def ratios(self, field: str, a: tuple[str, Cell], b: tuple[str, Cell]) -> dict[str, float] | None:
        if a not in self.rounds or b not in self.rounds:
            return None
        pairs = zip(self.rounds[a], self.rounds[b], strict=True)
        values = [getattr(x, field) / getattr(y, field) for x, y in pairs if x and y]
        return interval(values) if values else None

    def table(self) -> list[dict]:
        rows = []
        for (name, cell), values in self.rounds.items():
            present = [value for value in values if value]
            row = {"engine": name, "cell": cell.name, **asdict(cell)}
            for field in ("tokens_per_second", "first_token", "between_tokens"):
                row[field] = interval([getattr(value, field) for value in present])
            plain = (f"plain-{name.partition('-')[2]}", Cell(cell.batch, 0, tokens=cell.tokens))
            row["throughput_to_plain"] = self.ratios("tokens_per_second", (name, cell), plain)
            rows.append(row)
        return rows

    def summary(self) -> dict:
        """Returns ratios between cells of each engine."""
        ratios: dict[str, dict] = {}
        for engine in self.engines:
            name = engine.name
            ratios[name] = {
                "first token, 64 requests: 64 sets to one": self.ratios(
                    "first_token", (name, LATENCY[2]), (name, LATENCY[1])
                ),
                "first token, alone: a set never seen to a seen one": self.ratios(
                    "first_token", (name, SINGLE[1]), (name, SINGLE[0])
                ),
            }
        return ratios


def astuple(measured: Measured) -> tuple[float, float, float]:
    return measured.tokens_per_second, measured.first_token, measured.between_tokens


async def main(arguments: argparse.Namespace, keep: Callable[[dict], None]) -> dict:
    """Runs everything.

    Args:
        keep: called with the result so far after each round, so that an interrupted run leaves results.
    """
    import vllm

    before = machine()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="loraf-serving-") as folder:
        root = Path(folder)
        model = make_model(root / "model")
        checkpoints = make_checkpoints(root, model)
        engines = make_engines(arguments.engines, model, root, arguments.dtype)
        try:
            for engine in engines:
                begin = time.perf_counter()
                await engine.start(checkpoints)
                say(f"{engine.name}: started in {time.perf_counter() - begin:.0f} s")
            run = Run(engines, arguments.only, say)
            for engine, cell in run.cells:  # warm-up, not kept
                await run.cell(engine, cell)
            for number in range(arguments.rounds):
                await run.round(number, arguments.rounds)
                result = {
                    "question": "what does a task set cost in an engine?",
                    "machine": before,
                    "commit": commit(),
                    "vllm": vllm.__version__,
                    "dtype": arguments.dtype,
                    "rounds": number + 1,
                    "summary": run.summary(),
                    "cells": run.table(),
                }
                keep(result)
        finally:
            for engine in engines:
                await engine.stop()
    return result


def show(result: dict) -> None:
    print(f"{'engine':<18} {'cell':<58} {'tok/s':>7} {'to plain':>22} {'first token':>12}")
    for row in sorted(result["cells"], key=lambda row: (row["engine"], row["tasks"], row["batch"], row["sets"])):
        ratio = row["throughput_to_plain"]
        text = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})" if ratio else ""
        speed, first = row["tokens_per_second"]["median"], row["first_token"]["median"]
        print(f"{row['engine']:<18} {row['cell']:<58} {speed:>7.0f} {text:>22} {first * 1e3:>9.1f} ms")
    print(json.dumps({"summary": result["summary"]}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--only", default="", help="run only cells whose name matches this regular expression")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default=str(RESULT), help="- writes no file")
    options = parser.parse_args()

    def write(result: dict) -> None:
        if options.out != "-":
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n")

    show(asyncio.run(main(options, write)))
