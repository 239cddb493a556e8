"""Generates the data of the comparison of retention: eight tasks that the base model `tiny` does not know.

    python examples/retention/make_data.py --out examples/retention/data

    pig-latin    Pig Latin: kitten                 →  ittenkay
    count        How many letters are in kitten?   →  six
    outer        Outer letters of kitten please    →  k and n
    article      Article for apple                 →  an apple
    stretch      Stretch: kitten                   →  kittennn
    plural       More than one fly is              →  flies
    shout        Shout kitten now                  →  KITTEN!
    initials     Initials: kitten, fly             →  K.F.

Writes for each task

    <task>.train.jsonl    for training
    <task>.dev.jsonl      for choosing learning rates and strengths
    <task>.eval.jsonl     for the reported scores

and general.jsonl, new questions for every skill that `tiny` was trained in. Each line is
{"prompt": …, "completion": …}. No prompt of a task occurs twice, so its three files share none. Words are random
letters. The same seed gives the same files on every machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1]
VOWELS = "aeiou"

Record = dict[str, str]  # prompt, completion


def module(file: Path) -> ModuleType:
    """Imports a script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(f"_{file.parent.name}_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


compare = module(EXAMPLES / "compare" / "make_data.py")
demo = compare.demo


def outer(rng: random.Random) -> Record:
    word = demo.made_up_word(rng, 7)
    return {"prompt": f"Outer letters of {word} please\n", "completion": f"{word[0]} and {word[-1]}"}


def article(rng: random.Random) -> Record:
    """Returns a question whose two articles are about equally likely."""
    word = demo.made_up_word(rng, 6)
    if rng.random() < 0.5:
        word = rng.choice(VOWELS) + word[1:]
    return {"prompt": f"Article for {word}\n", "completion": f"{'an' if word[0] in VOWELS else 'a'} {word}"}


def stretch(rng: random.Random) -> Record:
    word = demo.made_up_word(rng, 6)
    return {"prompt": f"Stretch: {word}\n", "completion": word + 2 * word[-1]}


def plural(rng: random.Random) -> Record:
    """Returns a question about a word that ends in y, in a hissing letter or in any letter, all equally likely."""
    word = demo.made_up_word(rng, 5) + rng.choice(("y", rng.choice("sxz"), rng.choice(demo.ALPHABET)))
    many = word[:-1] + "ies" if word[-1] == "y" else word + ("es" if word[-1] in "sxz" else "s")
    return {"prompt": f"More than one {word} is\n", "completion": many}


def shout(rng: random.Random) -> Record:
    word = demo.made_up_word(rng, 7)
    return {"prompt": f"Shout {word} now\n", "completion": f"{word.upper()}!"}


def initials(rng: random.Random) -> Record:
    first, second = demo.made_up_word(rng, 5), demo.made_up_word(rng, 5)
    return {"prompt": f"Initials: {first}, {second}\n", "completion": f"{first[0]}.{second[0]}.".upper()}


TASKS = {
    **demo.TASKS,
    **{draw.__name__: draw for draw in (outer, article, stretch, plural, shout, initials)},
}


def records(task: str, number: int, seed: int) -> list[Record]:
    """Returns `number` records of a task with different prompts."""
    rng = random.Random(f"retention {seed} {task}")
    by_prompt: dict[str, Record] = {}
    while len(by_prompt) < number:
        record = TASKS[task](rng)
        by_prompt.setdefault(record["prompt"], record)
    return list(by_prompt.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        drawn = iter(records(task, sum(compare.SPLITS.values()), arguments.seed))
        for split, count in compare.SPLITS.items():
            compare.write(arguments.out / f"{task}.{split}.jsonl", [next(drawn) for _ in range(count)])
    compare.write(arguments.out / "general.jsonl", compare.general(arguments.seed))


if __name__ == "__main__":
    main()
