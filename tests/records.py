"""Real records for tests: the whole sets where they are at hand, a committed handful where not."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANDFUL = ROOT / "tests" / "fixtures" / "records"
NLU_SETS = ("boolq", "openbookqa", "arc_easy", "arc_challenge")  # those whose training records are at hand
PAPER_SETS = ("boolq", "piqa", "social_i_qa", "arc_easy", "arc_challenge", "openbookqa")
_QUESTIONS = {  # in the form of the sets of which nothing is committed
    "piqa": ("Please choose the correct solution to the question: {}\n\n{}\n\nAnswer format: {}", "solution", 2),
    "social_i_qa": ("Please choose the correct answer to the question: {}\n\n{}\n\nAnswer format: {}", "answer", 3),
}
_THINGS = ("a lamp that is broken", "soup that is too hot", "a door that sticks", "a friend who is late")


def data_folder() -> Path:
    """The folder that LORAF_TEST_DATA names, or `../shared/data` beside the repository; else the handful."""
    whole = Path(os.environ.get("LORAF_TEST_DATA", ROOT.parent / "shared" / "data"))
    if (whole / "gsm8k" / "train.jsonl").is_file():
        return whole
    warnings.warn(f"{whole} has no records: the test runs on the committed handful", stacklevel=2)
    return HANDFUL


def made_up(name: str, count: int = 8) -> list[dict[str, str]]:
    """Records in the form of `piqa` or `social_i_qa`, made here."""
    form, kind, answers = _QUESTIONS[name]
    choices = [f"{kind}{i}" for i in range(1, answers + 1)]
    listed = " ".join(f"{choice.capitalize()}: do thing {choice[-1]}" for choice in choices)
    records = []
    for i in range(count):
        answer = choices[i % answers]
        question = f"What helps with {_THINGS[i % len(_THINGS)]}, case {i}?"
        instruction = form.format(question, listed, "/".join(choices))
        output = f"the correct answer is {answer}"
        records.append({"instruction": instruction, "input": "", "output": output, "answer": answer})
    return records


def lay_out(folder: Path, source: Path) -> None:
    """Puts records where examples/mistral-7b/tasks.yaml looks for them, below `folder`/data.

    Args:
        source: whole sets or the handful; what it lacks of the paper's six sets is made up.
    """
    (folder / "data" / "nlu").mkdir(parents=True)
    (folder / "data" / "gsm8k").symlink_to(source / "gsm8k")
    for name in PAPER_SETS:
        target = folder / "data" / "nlu" / name
        target.mkdir()
        for part in ("train.json", "test.json"):
            if (source / "nlu" / name / part).is_file():
                (target / part).symlink_to(source / "nlu" / name / part)
            else:
                (target / part).write_text(json.dumps(made_up(name)))
