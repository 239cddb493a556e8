"""The built-in metrics: whether the text of an answer is right; and the confidence intervals of scores.

exact_match   the whole answer, except for white space at its ends
gsm8k         the number that the answer states
choice        the first of the given choices that the answer names
loss          not about texts: the mean loss of completion tokens (loraf_train.scoring.evaluate), lower is better
preference    not about texts: the share of pairs whose chosen answer is more likely (loraf_train.scoring.evaluate)

Any other name with a dot or a colon is a function of the user's own, see `loraf_train.grading.custom`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

# of every built-in metric
DEFAULT_NEW_TOKENS = {"exact_match": 32, "gsm8k": 256, "choice": 32, "loss": 0, "preference": 0}
DEFAULT_METRIC = "exact_match"
PREFERENCE = "preference"
OWN_METRIC_NEW_TOKENS = 256
MEAN = "mean"  # the plain mean over a task's evaluation sets, among its scores
LOWER_IS_BETTER = frozenset({"loss"})

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
_MARKER = re.compile(r"####|the final answer is:?", re.IGNORECASE)

# A character that joins its neighbour to one word: letters, marks and digits of scripts that put spaces between words.
_UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Le", "New_Tai_Lue")
)
_IN_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}ー]]"
_BEGINS_IN_WORD = rf"\A{_IN_WORD}"
_ENDS_IN_WORD = rf"[{_IN_WORD}--\p{{Hangul}}]\Z"

_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 1 << 22  # drawn examples in memory at a time


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

    Only whole words count: `true` does not occur in `untrue`, nor `нет` in `интернет`. Scripts without spaces between
    words (Han, kana, Thai and others) have no such borders, and a Korean word may have a particle attached.
    """
    import regex  # `inspect` needs this module, and should start fast

    best: tuple[int, int, str] | None = None
    text = unicodedata.normalize("NFC", text)
    for choice in choices:
        word = unicodedata.normalize("NFC", choice)
        before = rf"(?<!{_IN_WORD})" if regex.search(_BEGINS_IN_WORD, word, regex.VERSION1) else ""
        after = rf"(?!{_IN_WORD})" if regex.search(_ENDS_IN_WORD, word, regex.VERSION1) else ""
        match = regex.search(before + regex.escape(word) + after, text, regex.VERSION1)
        if match and (best is None or (match.start(), -len(word)) < best[:2]):
            best = (match.start(), -len(word), choice)
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


def mean_interval(grades: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns a 95 % interval of the mean of grades from 0 to 1: bootstrapped, from the percentiles of resampled means.

    Of grades that are all 0 or 1, or all equal, it is Wilson's interval: the bootstrap says nothing about a set without
    spread, and Wilson's is wide enough for any grades of that mean.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        seed: of the resampling, so that the same grades always give the same interval.
    """
    import numpy as np

    values = np.asarray(grades, dtype=np.float64)
    if len(values) < 2 or np.isin(values, (0.0, 1.0)).all() or (values == values[0]).all():
        return wilson_interval(float(values.sum()), len(values))
    rng = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLES_AT_ONCE // len(values))
    means = [
        values[rng.integers(len(values), size=(min(at_once, _RESAMPLES - done), len(values)))].mean(axis=1)
        for done in range(0, _RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
