"""The built-in metrics: whether the text of an answer is right, and the confidence interval of a share.

exact_match   the whole answer, except for white space at its ends
gsm8k         the number that the answer states
choice        the first of the given choices that the answer names
loss          not about texts: the mean loss of completion tokens (loraf_train.scoring.evaluate), lower is better

Any other name with a dot or a colon is a function of the user's own, see `loraf_train.grading.custom`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

DEFAULT_NEW_TOKENS = {"exact_match": 32, "gsm8k": 256, "choice": 32, "loss": 0}  # of every built-in metric
DEFAULT_METRIC = "exact_match"
OWN_METRIC_NEW_TOKENS = 256
MEAN = "mean"  # the plain mean over a task's evaluation sets, among its scores
LOWER_IS_BETTER = frozenset({"loss"})

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
_MARKER = re.compile(r"####|the final answer is:?", re.IGNORECASE)


def exact_match(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


def stated_number(text: str) -> float | None:
    """Returns the first number after the first `####` or «The final answer is:», else the last; without commas.

    Source: the extraction in the authors' later code (juzhengz/LoRI), whose completions end in either marker. A minus
    sign after a digit or a closing bracket is a subtraction, not part of the number.
    """
    marker = _MARKER.search(text)
    after = _NUMBER.search(text, marker.end()) if marker else None
    number = after.group() if after else next(reversed(_NUMBER.findall(text)), None)
    return None if number is None else float(number.replace(",", ""))


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that `text` names first, of two at one place the longer (answer1, answer10); None: none.

    Only whole words count: `true` does not occur in `untrue`.
    """
    best: tuple[int, int, str] | None = None
    for choice in choices:
        before = r"(?<![A-Za-z0-9_])" if re.match(r"\w", choice, re.ASCII) else ""
        after = r"(?![A-Za-z0-9_])" if re.search(r"\w\Z", choice, re.ASCII) else ""
        match = re.search(before + re.escape(choice) + after, text)
        if match and (best is None or (match.start(), -len(choice)) < best[:2]):
            best = (match.start(), -len(choice), choice)
    return best[2] if best else None


def expected_answer(metric: str, completion: str, answer: str | None, choices: Sequence[str]) -> str | None:
    """Returns a record's right answer in the form that `is_right` expects; None: it has none.

    Args:
        completion: the record's completion, which a perfect model would generate.
        answer: the record's `answer` field, if it has one.
    """
    if metric == "gsm8k":
        number = stated_number(completion)
        return None if number is None else repr(number)
    if metric == "choice":
        label = answer.strip() if answer is not None else None
        return label if label in choices else first_choice(completion, choices)
    return completion


def is_right(metric: str, text: str, expected: str, choices: Sequence[str] = ()) -> bool:
    """Whether a generated text gives the expected answer.

    Raises:
        ValueError: `metric` does not grade texts.
    """
    if metric == "exact_match":
        return exact_match(text, expected)
    if metric == "gsm8k":
        return stated_number(text) == float(expected)
    if metric == "choice":
        return first_choice(text, choices) == expected
    raise ValueError(f"{metric} does not grade texts")


def wilson_interval(right: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion, 95 % by default (E. B. Wilson, 1927).

    Args:
        right: number of right answers among `count`.
        z: quantile of the normal distribution.
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))
