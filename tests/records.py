"""Real records for tests: the whole data sets if available, otherwise a committed sample."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "fixtures" / "records"
NLU_SETS = ("boolq", "openbookqa", "arc_easy", "arc_challenge")  # whose training records are available
PAPER_SETS = ("boolq", "piqa", "social_i_qa", "arc_easy", "arc_challenge", "openbookqa")
_QUESTIONS = {  # in the form of the sets without a committed sample
    "piqa": ("Please choose the correct solution to the question: {}\n\n{}\n\nAnswer format: {}", "solution", 2),
    "social_i_qa": ("Please choose the correct answer to the question: {}\n\n{}\n\nAnswer format: {}", "answer", 3),
}
_THINGS = ("a lamp that is broken", "soup that is too hot", "a door that sticks", "a friend who is late")


def data_folder() -> Path:
    """Returns the folder that LORAF_TEST_DATA names, or `../shared/data`, or the committed sample."""
    whole = Path(os.environ.get("LORAF_TEST_DATA", ROOT.parent / "shared" / "data"))
    if (whole / "gsm8k" / "train.jsonl").is_file():
        return whole
    warnings.warn(f"{whole} has no records: the test uses the committed sample", stacklevel=2)
    return SAMPLE


def made_up(name: str, count: int = 8) -> list[dict[str, str]]:
    """Returns synthetic records in the form of `piqa` or `social_i_qa`."""
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
    """Links records to where examples/mistral-7b/tasks.yaml expects them, below `folder`/data.

    Args:
        source: whole data sets or the sample. Of the paper's six sets, missing ones are replaced by synthetic records.
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
