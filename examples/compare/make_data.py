"""Generates the data of the comparison: the demo's two tasks, and general text that the base model `tiny` knows.

    python examples/compare/make_data.py --out examples/compare/data

    <task>.train.jsonl    for training
    <task>.dev.jsonl      for choosing learning rates
    <task>.eval.jsonl     for the reported scores
    general.jsonl         new questions for every skill that `tiny` was trained in, equally many of each

Each line is {"prompt": …, "completion": …}. No prompt of a task occurs twice, so the three files of a task share none.
The same seed gives the same files on every machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SPLITS = {"train": 4800, "dev": 200, "eval": 250}
OF_EACH_SKILL = 20


def module(file: Path) -> ModuleType:
    """Imports a script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(f"_{file.parent.name}_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


demo = module(ROOT / "examples" / "demo" / "make_data.py")
tiny = module(ROOT / "tools" / "make_tiny.py")


def general(seed: int) -> list[dict[str, str]]:
    """Draws questions from another random stream than those for `tiny`'s training and scores. All prompts differ."""
    records: dict[str, dict[str, str]] = {}
    for name, draw in tiny.SKILLS.items():
        rng = random.Random(f"general {seed} {name}")
        target = len(records) + OF_EACH_SKILL
        while len(records) < target:
            prompt, completion = draw(rng)
            records.setdefault(prompt, {"prompt": prompt, "completion": completion})
    return list(records.values())


def write(file: Path, records: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in demo.TASKS:
        records = iter(demo.records(task, sum(SPLITS.values()), arguments.seed))
        for split, count in SPLITS.items():
            write(arguments.out / f"{task}.{split}.jsonl", [next(records) for _ in range(count)])
    write(arguments.out / "general.jsonl", general(arguments.seed))


if __name__ == "__main__":
    main()
