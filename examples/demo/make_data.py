"""Generates the data of the demo's two tasks, neither of which the base model `tiny` knows.

    python examples/demo/make_data.py --out examples/demo/data

    pig-latin     Pig Latin: kitten                  →  ittenkay    the first letter goes to the end, then "ay"
    count         How many letters are in kitten?    →  six

For each task `<task>.train.jsonl` and `<task>.eval.jsonl`, one {"prompt": …, "completion": …} a line. No prompt occurs
twice, so the evaluation examples are held out. The same seed gives the same files on every machine.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
TRAIN_RECORDS, EVAL_RECORDS = 6400, 250

Record = dict[str, str]  # prompt, completion


def made_up_word(rng: random.Random, longest: int) -> str:
    """3 to `longest` letters, each length equally often."""
    return "".join(rng.choices(ALPHABET, k=rng.randint(3, longest)))


def pig_latin(rng: random.Random) -> Record:
    word = made_up_word(rng, 6)  # the base model's own skill at copying gets weaker with longer words
    return {"prompt": f"Pig Latin: {word}\n", "completion": word[1:] + word[0] + "ay"}


def count(rng: random.Random) -> Record:
    """A question; no answer is right more often than 1 time in 6."""
    word = made_up_word(rng, 8)
    return {"prompt": f"How many letters are in {word}?\n", "completion": NUMBERS[len(word)]}


TASKS = {"pig-latin": pig_latin, "count": count}


def records(task: str, number: int, seed: int) -> list[Record]:
    """`number` records of a task, all prompts different."""
    rng = random.Random(f"{seed} {task}")
    found: dict[str, Record] = {}
    while len(found) < number:
        record = TASKS[task](rng)
        found.setdefault(record["prompt"], record)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        made = records(task, TRAIN_RECORDS + EVAL_RECORDS, arguments.seed)
        for split, part in {"train": made[:TRAIN_RECORDS], "eval": made[TRAIN_RECORDS:]}.items():
            lines = "".join(json.dumps(record) + "\n" for record in part)
            (arguments.out / f"{task}.{split}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
