"""A name as one text for an adapter and a set of its tasks, whichever door it came through."""

from __future__ import annotations

import time

import pytest

from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.errors import InvalidRequest
from loraf_serve.limits import MAX_SELECTED_TASKS
from loraf_serve.request import names, selection
from loraf_serve.security.permissions import Permissions
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.harness import one_adapter, two_adapters


@pytest.mark.parametrize(
    ("text", "task_set"),
    [
        ("base", ""),
        ("", "math+nlu+code"),
        ("trio", "math+nlu+code"),
        ("trio@all", "math+nlu+code"),
        ("trio@nlu+math:0.5", "math:0.5+nlu"),
        ("@nlu,math:0.5", "math:0.5+nlu"),
        ("trio@as_trained=nlu", "math+nlu"),
        ("trio@support", "math:2.0"),
        ("trio@base", ""),
    ],
)
def test_what_a_name_selects(text, task_set):
    registry = one_adapter().with_sets(OperatorSets.parse(["trio/support=math:2"]))
    request = pb.GenerateRequest()
    names.read(text).select(request, registry, Permissions())
    errors = []
    _, selected, _ = selection.read(request, registry, errors)
    assert errors == [] and str(selected) == (task_set or str(type(selected)()))


def test_errors_name_the_field_of_the_door():
    for field in ("model", "lora_name"):
        with pytest.raises(InvalidRequest) as caught:
            names.read("trio@math:x", field)
        assert [problem.field for problem in caught.value.problems] == [field]


def test_a_name_of_very_many_tasks_is_refused_at_once():
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=f"use at most {MAX_SELECTED_TASKS}"):
        names.read("trio@" + "+".join(["math"] * 1_000_000))
    assert time.monotonic() - began < 1


def test_the_list_has_adapters_tasks_and_named_sets_that_a_client_may_use():
    registry = two_adapters().with_sets(OperatorSets.parse(["trio/support=math+nlu"]))
    everything = [name for name, _ in names.listed(registry, None)]
    trio = ["trio", "trio@math", "trio@nlu", "trio@code", "trio@support"]
    assert everything == [*trio, "pair", "pair@nlu", "pair@code"]
    assert [name for name, _ in names.listed(registry.limited_to(frozenset({"nlu"})), frozenset({"nlu"}))] == [
        "trio@nlu",
        "pair@nlu",
    ]
