"""Task sets: one canonical form, one text for it, and all mistakes reported at once."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf.errors import CheckpointError, Problem, SelectionError, UnknownTask
from loraf.tasksets import MAX_WEIGHT, TaskSet, name_problem

ORDER = ("math", "nlu", "code")
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda n: n not in {"all", "base"})
WEIGHTS = st.floats(-MAX_WEIGHT, MAX_WEIGHT)


@st.composite
def orders_and_weights(draw):
    order = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    chosen = draw(st.lists(st.sampled_from(order), unique=True))
    return order, [(name, draw(WEIGHTS)) for name in chosen]


@given(orders_and_weights())
def test_text_and_set_determine_each_other(case):
    order, pairs = case
    task_set = TaskSet.of(pairs, order)
    assert TaskSet.parse(str(task_set), order) == task_set
    assert TaskSet.of(dict(pairs), order) == task_set
    assert TaskSet.of(task_set.weights, order) == task_set


@given(orders_and_weights(), st.randoms())
def test_equal_sets_have_one_canonical_form(case, random):
    order, pairs = case
    shuffled = list(pairs)
    random.shuffle(shuffled)
    task_set = TaskSet.of(shuffled, order)
    assert task_set == TaskSet.of(pairs, order)
    assert hash(task_set) == hash(TaskSet.of(pairs, order))
    assert list(task_set.names) == [name for name in order if dict(pairs).get(name, 0) != 0]
    assert all(weight != 0 and type(weight) is float for _, weight in task_set.weights)


@given(orders_and_weights(), orders_and_weights())
def test_different_sets_have_different_texts(left, right):
    order = list(dict.fromkeys([*left[0], *right[0]]))
    one, other = TaskSet.of(left[1], order), TaskSet.of(right[1], order)
    assert (one == other) == (str(one) == str(other))


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_a_task_of_weight_zero_is_left_out(zero):
    assert TaskSet.of({"math": zero, "nlu": 1}, ORDER) == TaskSet.of({"nlu": 1.0}, ORDER)
    assert TaskSet.parse(f"math:{zero}", ORDER) == TaskSet()
    assert TaskSet.of({"math": zero}, ORDER).is_base


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("base", ()),
        ("all", (("math", 1.0), ("nlu", 1.0), ("code", 1.0))),
        ("nlu", (("nlu", 1.0),)),
        ("code+math", (("math", 1.0), ("code", 1.0))),
        ("code:-0.5+math:16", (("math", 16.0), ("code", -0.5))),
        (" math : 0.5 + nlu ", (("math", 0.5), ("nlu", 1.0))),
        ("math:1e-05", (("math", 1e-05),)),
        ("math:1", (("math", 1.0),)),
    ],
)
def test_parse_by_hand(text, weights):
    assert TaskSet.parse(text, ORDER).weights == weights


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({}, "base"),
        ({"math": 1}, "math"),
        ({"nlu": 1, "math": 0.5}, "math:0.5+nlu"),
        ({"math": 0.1 + 0.2}, "math:0.30000000000000004"),
        ({"math": 5e-324}, "math:5e-324"),
        ({"math": -1}, "math:-1.0"),
    ],
)
def test_text_by_hand(weights, text):
    assert str(TaskSet.of(weights, ORDER)) == text


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 17, -16.000001, 10**400])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(SelectionError, match="from -16 to 16") as caught:
        TaskSet.of({"math": weight}, ORDER)
    assert [problem.field for problem in caught.value.problems] == ["tasks[0].weight"]
    assert not isinstance(caught.value, UnknownTask)


@pytest.mark.parametrize("text", ["math:nan", "math:inf", "math:-1e999", "math:17"])
def test_a_weight_out_of_range_is_refused_in_text(text):
    with pytest.raises(SelectionError, match="out of range"):
        TaskSet.parse(text, ORDER)


@pytest.mark.parametrize("weight", [16, -16, 16.0])
def test_the_ends_of_the_range_are_accepted(weight):
    assert TaskSet.of({"math": weight}, ORDER).weights == (("math", float(weight)),)


def test_a_duplicate_name_is_refused_even_with_weight_zero():
    for pairs in ([("math", 1), ("math", 1)], [("math", 0), ("math", 1)], [("math", 1), ("nlu", 1), ("math", 0)]):
        with pytest.raises(SelectionError, match="'math' is named twice"):
            TaskSet.of(pairs, ORDER)
    with pytest.raises(SelectionError, match="'math' is named twice"):
        TaskSet.parse("math+math", ORDER)


@pytest.mark.parametrize(
    "text",
    ["", "+", "math+", "a+b", "a:b", "../x", "all:0.5", "base+math", "math+all", "Math", "math\n+", ":1", "math,nlu"],
)
def test_invalid_texts_are_refused_with_the_known_tasks(text):
    with pytest.raises(SelectionError) as caught:
        TaskSet.parse(text, ORDER)
    assert "choose from: math, nlu, code" in str(caught.value)


def test_unknown_names_are_all_listed():
    with pytest.raises(UnknownTask) as caught:
        TaskSet.parse("science+math+art", ORDER)
    assert [p.field for p in caught.value.problems] == ["tasks[0].name", "tasks[2].name"]
    assert "'science'" in str(caught.value)
    assert "'art'" in str(caught.value)
    with pytest.raises(UnknownTask, match="choose from: none"):
        TaskSet.of({"math": 1}, ())


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(SelectionError) as caught:
        TaskSet.parse("math:x+nlu:17+nlu+art:nan+code:1", ORDER)
    assert sorted(problem.field for problem in caught.value.problems) == [
        "tasks[0].weight",
        "tasks[1].weight",
        "tasks[2].name",
        "tasks[3].name",
        "tasks[3].weight",
    ]
    assert all(problem.remedy for problem in caught.value.problems)


@given(st.text(max_size=30))
def test_any_text_is_a_set_or_a_selection_error(text):
    try:
        task_set = TaskSet.parse(text, ORDER)
    except SelectionError as error:
        assert error.problems
    else:
        assert TaskSet.parse(str(task_set), ORDER) == task_set


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "math", "a.b-c_d", "x" * 64, "a..", "0-"])
def test_valid_names_are_accepted(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "all",
        "base",
        "A",
        "a+b",
        "a:b",
        "../x",
        "a/b",
        ".a",
        "-a",
        "_a",
        "a b",
        "a\n",
        "ä",
        "x" * 65,
        "٣",
        "a\0",
        "a,b",
    ],
)
def test_invalid_names_are_refused(name):
    problem = name_problem(name, "adapter", field="tasks[0].name", file="tasks.yaml")
    assert problem is not None
    assert (problem.field, problem.file) == ("tasks[0].name", "tasks.yaml")
    assert "adapter name" in problem.message + problem.remedy
    assert problem.remedy


# --- errors -----------------------------------------------------------------------------------------------------


def test_an_error_says_where_what_and_how_to_fix_it():
    one = Problem("is 3", "rank", "tasks.yaml", "use 4")
    assert str(one) == "tasks.yaml: rank: is 3 → use 4"
    assert str(CheckpointError(one)) == str(one)
    assert str(CheckpointError([one, Problem("is missing", "seed")])) == f"1. {one}\n2. seed: is missing"
    assert str(CheckpointError("plain")) == "plain"


def test_errors_can_be_pickled():
    """vLLM's workers and data loaders pickle exceptions."""
    error = UnknownTask([Problem("there is no task 'x'", "tasks[0].name"), Problem("nor 'y'", remedy="choose z")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnknownTask
    assert again.problems == error.problems
    assert str(again) == str(error)
