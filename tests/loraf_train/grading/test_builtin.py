"""The built-in metrics, and Wilson's interval against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from loraf_train.grading.builtin import (
    exact_match,
    expected_answer,
    first_choice,
    is_right,
    mean_interval,
    stated_number,
    wilson_interval,
)

RECORDS = Path(__file__).parents[2] / "fixtures" / "records"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", 72.0),
        ("The final answer is: 18", 18.0),
        ("the final answer is 18.", 18.0),
        ("so far 3\n#### 1,234,567\nand 5", 1234567.0),
        ("#### -5", -5.0),
        ("#### $-5.50", -5.5),
        ("#### 4 #### 5", 4.0),
        ("The final answer is: x #### 7", 7.0),
        ("first 3, then 4", 4.0),
        ("16-3", 3.0),
        ("(2)-7", 7.0),
        ("at -7", -7.0),
        ("costs $.75", 0.75),
        ("10,", 10.0),
        ("5 apples ####", 5.0),  # nothing after the marker: the last number
        ("#### none", None),
        ("", None),
    ],
)
def test_stated_number(text, number):
    assert stated_number(text) == number


def test_gsm8k_numbers_of_real_records():
    lines = [line for file in RECORDS.glob("gsm8k/*.jsonl") for line in file.read_text().splitlines()]
    assert lines
    for line in lines:
        answer = json.loads(line)["answer"]
        number = float(answer.split("####")[1].strip().replace(",", ""))
        assert stated_number(answer) == number
        expected = expected_answer("gsm8k", answer, answer, ())
        assert is_right("gsm8k", f"I think.\nThe final answer is: {number:,}", expected)
        assert not is_right("gsm8k", f"#### {number + 1}", expected)
        assert not is_right("gsm8k", "no idea", expected)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the correct answer is true", "true"),
        ("false, not true", "false"),
        ("untrue", None),
        ("truest", None),
        ("true.", "true"),
        ("'true'", "true"),
        ("True", None),
        ("", None),
    ],
)
def test_first_choice(text, choice):
    assert first_choice(text, ["true", "false"]) == choice


def test_first_choice_takes_the_longer_of_two_at_one_place():
    assert first_choice("it is answer10", ["answer1", "answer10"]) == "answer10"
    assert first_choice("it is answer1", ["answer10", "answer1"]) == "answer1"
    assert first_choice("new york city", ["new york", "new york city"]) == "new york city"
    assert first_choice("(B) and (A)", ["(A)", "(B)"]) == "(B)"
    assert first_choice("我选对的", ["错", "对"]) == "对"  # no spaces between words


@pytest.mark.parametrize(
    ("text", "choices", "choice"),
    [
        ("это интернет, а не нет", ["да", "нет"], "нет"),
        ("интернет", ["да", "нет"], None),
        ("naïve", ["na"], None),
        ("étrue", ["true"], None),
        ("नहीं", ["नही"], None),  # a mark belongs to the letter before it
        ("हाँ।", ["हाँ"], "हाँ"),
        ("答案是true", ["true", "false"], "true"),
        ("คำตอบคือใช่ครับ", ["ใช่"], "ใช่"),
        ("정답은 참입니다", ["참", "거짓"], "참"),  # with a particle
        ("нет2", ["нет"], None),
        ("Cafe\u0301!", ["Café"], "Café"),  # composed and decomposed
    ],
)
def test_first_choice_knows_words_of_every_script(text, choices, choice):
    assert first_choice(text, choices) == choice


def test_first_choice_agrees_with_a_slow_search_on_real_answers():
    choices = [f"answer{i}" for i in range(1, 6)]
    files = [*RECORDS.glob("nlu/arc*/*.json"), *RECORDS.glob("nlu/openbookqa/*.json")]
    records = [record for file in files for record in json.loads(file.read_text())]
    assert len(records) > 10
    for record in records:
        words = record["output"].replace(".", " ").split()
        assert first_choice(record["output"], choices) == next(w for w in words if w in choices) == record["answer"]


def test_the_expected_choice_is_the_label_or_the_first_choice_in_the_completion():
    choices = ("true", "false")
    assert expected_answer("choice", "the correct answer is true", None, choices) == "true"
    assert expected_answer("choice", "yes", "false", choices) == "false"
    assert expected_answer("choice", "it is true", "a long worked answer", choices) == "true"
    assert expected_answer("choice", "yes", None, choices) is None


def test_exact_match():
    assert exact_match(" a b\n", "a b")
    assert not exact_match("a  b", "a b")
    assert not exact_match("A b", "a b")
    assert is_right("exact_match", "x ", "x")


def test_loss_cannot_grade_a_text():
    with pytest.raises(ValueError, match="loss"):
        is_right("loss", "a", "a")


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 50), (1, 1), (3, 10), (37, 200), (199, 200), (1, 100_000)])
def test_wilson_interval_against_its_definition(right, count):
    """Its ends are the proportions p from which the observed share is exactly z standard errors away."""
    z, share = 1.959963984540054, right / count

    def excess(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / count)

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
        return outside

    low, high = wilson_interval(right, count)
    inner = (share + z * z / (2 * count)) / (1 + z * z / count)
    assert low == pytest.approx(root(inner, 0.0) if share > 0 else 0.0, abs=1e-9)
    assert high == pytest.approx(root(inner, 1.0) if share < 1 else 1.0, abs=1e-9)
    assert 0 <= low <= share <= high <= 1  # exactly, rounding aside


@pytest.mark.parametrize("count", [2, 30, 500])
def test_the_interval_of_a_mean_is_the_bootstraps(count):
    grades = np.random.default_rng(count).beta(2, 3, count)
    reference = scipy.stats.bootstrap((grades,), np.mean, method="percentile", n_resamples=9999).confidence_interval
    assert mean_interval(grades) == pytest.approx((reference.low, reference.high), abs=0.03)
    assert mean_interval(grades) == mean_interval(grades)


def test_the_interval_of_grades_without_spread_is_wilsons():
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)  # right or wrong
    assert mean_interval([0.5] * 8) == wilson_interval(4, 8)
    assert mean_interval([0.25]) == wilson_interval(0.25, 1)


def test_wilson_interval_without_examples():
    assert wilson_interval(0, 0) == (0.0, 1.0)
