"""A task set in text: one meaning at every door, and all mistakes at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf import set_text
from loraf.errors import SelectionError, UnknownTask
from loraf.manifest import Manifest
from loraf.tasksets import MAX_WEIGHT, TaskSet
from tests.loraf.small_manifests import EXTENDED

# Tasks math and nlu, trained on top of math; the named set "careful".
ORDER = EXTENDED.task_names


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("math", "math"),
        ("math+nlu:0.5", "math+nlu:0.5"),
        ("math,nlu:0.5", "math+nlu:0.5"),
        (" nlu:0.5 , math ", "math+nlu:0.5"),
        ("all", "math+nlu"),
        (" base ", "base"),
        ("math:0", "base"),
        ("as_trained=nlu", "math+nlu"),
        ("as_trained = math", "math"),
        ("careful", "math:0.25"),
    ],
)
def test_what_a_text_selects(text: str, canonical: str) -> None:
    assert str(set_text.task_set(text, EXTENDED)) == canonical
    assert set_text.parse(text).of(EXTENDED) == set_text.task_set(text, EXTENDED)


def test_named_sets_may_be_given_in_place_of_the_checkpoints_own() -> None:
    mine = {"mine": TaskSet((("nlu", 2.0),))}
    assert set_text.task_set("mine", EXTENDED, mine) == mine["mine"]
    with pytest.raises(UnknownTask, match="no task or named set 'careful' → choose from: math, nlu, mine"):
        set_text.task_set("careful", EXTENDED, mine)


@given(st.dictionaries(st.sampled_from(ORDER), st.floats(-MAX_WEIGHT, MAX_WEIGHT)))
def test_the_canonical_text_of_every_set_is_read_back(weights: dict[str, float]) -> None:
    task_set = TaskSet.of(weights, ORDER)
    assert set_text.task_set(str(task_set), EXTENDED) == task_set


@given(st.text(alphabet="mathnlu+,:=0.5 -_!"))
def test_any_text_is_a_set_or_a_mistake_and_both_ways_of_reading_agree(text: str) -> None:
    def outcome(read: object) -> object:
        try:
            return read()  # type: ignore[operator]
        except SelectionError:
            return None

    assert outcome(lambda: set_text.task_set(text, EXTENDED)) == outcome(lambda: set_text.parse(text).of(EXTENDED))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no task is named", "math+nlu:0.5"]),
        ("math+", ["no task is named"]),
        ("Math", ["'Math' is not a valid task name"]),
        ("all+math", ["'all' takes no weight and no other task beside it → write all alone"]),
        ("base:0.5", ["'base' takes no weight"]),
        ("math:x+nlu:17+nlu", ["weight 'x' is not a number", "weight 17.0 is out of range", "'nlu' is named twice"]),
        ("trained=nlu", ["'trained=nlu' is not a task set → write as_trained=TASK"]),
        ("as_trained=", ["not a valid task name"]),
        ("as_trained=math+nlu", ["'math+nlu' is not a valid task name"]),
    ],
)
def test_mistakes_that_need_no_checkpoint(text: str, parts: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        set_text.parse(text)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    with pytest.raises(SelectionError):
        set_text.task_set(text, EXTENDED)


def test_mistakes_of_both_kinds_are_listed_together() -> None:
    with pytest.raises(SelectionError) as caught:
        set_text.task_set("math:x+art+careful", EXTENDED)
    text = str(caught.value)
    assert not isinstance(caught.value, UnknownTask)
    for part in ("weight 'x' is not a number", "no task 'art' → choose from: math, nlu", "'careful' is a named set"):
        assert part in text


def test_unknown_names_are_unknown_tasks() -> None:
    for text in ("art", "art+math", "as_trained=art", "", "math+all"):
        with pytest.raises(UnknownTask):
            set_text.task_set(text, EXTENDED)
    plain = Manifest(EXTENDED.base_model, EXTENDED.rank, EXTENDED.projection, EXTENDED.modules, EXTENDED.tasks)
    with pytest.raises(UnknownTask, match="there is no task 'art' → choose from: math, nlu"):
        set_text.task_set("art", plain)


@pytest.mark.parametrize("text", ["all", "base", "as_trained=nlu", "math", "math:0.5+nlu", "nlu:-16,math:0.123456789"])
def test_a_set_is_written_as_it_is_read(text):
    written = set_text.parse(text)
    assert set_text.parse(str(written)) == written
