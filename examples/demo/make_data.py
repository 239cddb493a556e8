"""Generates the data of the demo's two tasks, neither of which the base model `tiny` knows.

    python examples/demo/make_data.py --out examples/demo/data

    pig-latin     Pig Latin: kitten                  →  ittenkay    move the first letter to the end, append "ay"
    count         How many letters are in kitten?    →  six

Writes `<task>.train.jsonl` and `<task>.eval.jsonl` for each task. Each line is {"prompt": …, "completion": …}. No
prompt occurs twice, so the evaluation examples are held out. The same seed gives the same files on every machine.
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
    """Returns a word of 3 to `longest` random letters, all lengths equally likely."""
    return "".join(rng.choices(ALPHABET, k=rng.randint(3, longest)))


def pig_latin(rng: random.Random) -> Record:
    word = made_up_word(rng, 6)  # the base model copies longer words less reliably
    return {"prompt": f"Pig Latin: {word}\n", "completion": word[1:] + word[0] + "ay"}


def count(rng: random.Random) -> Record:
    """Returns a question whose six possible answers are equally likely."""
    word = made_up_word(rng, 8)
    return {"prompt": f"How many letters are in {word}?\n", "completion": NUMBERS[len(word)]}


TASKS = {"pig-latin": pig_latin, "count": count}


def records(task: str, number: int, seed: int) -> list[Record]:
    """Returns `number` records of a task with different prompts."""
    rng = random.Random(f"{seed} {task}")
    by_prompt: dict[str, Record] = {}
    while len(by_prompt) < number:
        record = TASKS[task](rng)
        by_prompt.setdefault(record["prompt"], record)
    return list(by_prompt.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        all_records = records(task, TRAIN_RECORDS + EVAL_RECORDS, arguments.seed)
        for split, part in {"train": all_records[:TRAIN_RECORDS], "eval": all_records[TRAIN_RECORDS:]}.items():
            lines = "".join(json.dumps(record) + "\n" for record in part)
            (arguments.out / f"{task}.{split}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
