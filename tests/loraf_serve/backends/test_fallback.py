"""A backend that turns out at start to be wrong, or not proven to be right, gives way to another; later it refuses."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from loraf.errors import Problem
from loraf.tasksets import TaskSet
from loraf_serve.adapters.checkpoint_folder import read_values
from loraf_serve.backends.backend import GenerationRequest, NotProven, Sampling, SelfCheckFailed
from loraf_serve.backends.fallback import Fallback
from tests.loraf_serve.fake_backend import FakeBackend, ReadingBackend
from tests.loraf_serve.harness import two_adapters

NUMBERS = itertools.count()
WRONG = SelfCheckFailed(Problem("adds 1 where ΔW gives 2", "model.layers.0.mlp.down_proj"))
UNPROVEN = NotProven(Problem("vLLM does not call it", "model.layers.0.self_attn.kv_b_proj"))


class Named(FakeBackend):
    def __init__(self, name: str):
        super().__init__()
        self.name = name


@pytest.fixture
def adapters():
    return list(two_adapters())


@pytest.fixture
def made():
    """(fallback, first, second, what was said)"""
    first, second, said = Named("first"), Named("second"), []
    return Fallback(first, {SelfCheckFailed: lambda error: second}, said.append, read_values), first, second, said


async def answer(backend: Fallback, adapter) -> str:
    task_set = TaskSet.parse(adapter.tasks[0], adapter.tasks)
    request = GenerationRequest(f"r{next(NUMBERS)}", (1, 2), Sampling(max_tokens=3), adapter, task_set)
    return "".join([choice.text async for output in backend.generate(request) for choice in output.choices])


@pytest.mark.parametrize("keeps_metrics", [False, True])
def test_every_backend_is_told_before_its_start_whether_metrics_are_kept(made, keeps_metrics) -> None:
    backend, first, second, _ = made
    told = []

    async def start(which) -> None:
        told.append((which.name, which.keeps_metrics))
        if which is first:
            raise WRONG

    first.start, second.start = (lambda: start(first)), (lambda: start(second))
    backend.keeps_metrics = keeps_metrics
    asyncio.run(backend.start())
    assert told == [("first", keeps_metrics), ("second", keeps_metrics)]


def test_the_first_serves_as_long_as_nothing_is_wrong(made, adapters) -> None:
    backend, first, second, said = made

    async def scenario() -> None:
        await backend.start()
        for adapter in adapters:
            await backend.add_adapter(adapter)
        assert backend.name == "first" and len(await answer(backend, adapters[0])) == 3
        await backend.remove_adapter(adapters[0])
        assert first.added == {adapters[1].digest}
        await backend.stop()

    asyncio.run(scenario())
    assert second.state == "new" and said == []


def test_the_second_takes_over_with_every_adapter_and_says_which_layer(made, adapters) -> None:
    backend, first, second, said = made

    async def scenario() -> None:
        await backend.start()
        await backend.add_adapter(adapters[0])
        first.add_failure = WRONG
        await backend.add_adapter(adapters[1])
        assert backend.name == "second" and len(await answer(backend, adapters[0])) == 3

    asyncio.run(scenario())
    assert first.state == "stopped"
    assert second.added == {adapter.digest for adapter in adapters}
    assert "model.layers.0.mlp.down_proj" in said[0] and "second" in said[1]


def test_after_an_answer_the_adapter_is_refused_instead(made, adapters) -> None:
    backend, first, second, said = made

    async def scenario() -> None:
        await backend.start()
        await backend.add_adapter(adapters[0])
        assert await answer(backend, adapters[0])
        first.add_failure = WRONG
        with pytest.raises(SelfCheckFailed, match="down_proj"):
            await backend.add_adapter(adapters[1])
        assert backend.name == "first" and await answer(backend, adapters[0])

    asyncio.run(scenario())
    assert second.state == "new" and said == []


def test_other_errors_do_not_change_the_backend(made, adapters) -> None:
    backend, first, second, said = made

    async def scenario() -> None:
        await backend.start()
        first.add_failure = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            await backend.add_adapter(adapters[0])

    asyncio.run(scenario())
    assert backend.name == "first" and second.state == "new"


def test_each_kind_of_error_has_its_own_backend_and_values_are_read_for_one_that_does_not(adapters) -> None:
    """Resident, which fails its self-check, then slots, of which nothing is proven, then merged."""
    first, second, merged, said = ReadingBackend(), ReadingBackend(), Named("merged"), []
    others = {SelfCheckFailed: lambda error: second, NotProven: lambda error: merged}
    backend = Fallback(first, others, said.append, read_values)

    async def scenario() -> None:
        await backend.start()
        await backend.add_adapter(adapters[0])
        first.add_failure, second.add_failure = WRONG, None
        await backend.add_adapter(adapters[1])
        assert backend.reads_checkpoints
        second.add_failure = UNPROVEN
        await backend.remove_adapter(adapters[1])
        await backend.add_adapter(adapters[1])

    asyncio.run(scenario())
    assert backend.name == "merged" and not backend.reads_checkpoints
    assert (first.state, second.state) == ("stopped", "stopped")
    assert merged.added == {adapter.digest for adapter in adapters}
    assert "kv_b_proj" in said[2] and "sets take turns" in said[3]
    for adapter in adapters:  # the values, which the first two kept in their own processes
        assert backend.adapter_bytes(adapter) == merged.adapter_bytes(adapter) + read_values(adapter).resident_bytes


def test_what_is_not_proven_is_refused_where_no_backend_stands_ready(made, adapters) -> None:
    backend, first, second, said = made

    async def scenario() -> None:
        await backend.start()
        first.add_failure = UNPROVEN
        with pytest.raises(NotProven, match="kv_b_proj"):
            await backend.add_adapter(adapters[0])

    asyncio.run(scenario())
    assert backend.name == "first" and second.state == "new" and said == []
