"""A backend that fails its self-check at start gives way to another; later it refuses."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from loraf.errors import Problem
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import GenerationRequest, Sampling, SelfCheckFailed
from loraf_serve.backends.fallback import Fallback
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import two_adapters

NUMBERS = itertools.count()
WRONG = SelfCheckFailed(Problem("adds 1 where ΔW gives 2", "model.layers.0.mlp.down_proj"))


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
    return Fallback(first, lambda: second, said.append), first, second, said


async def answer(backend: Fallback, adapter) -> str:
    task_set = TaskSet.parse(adapter.tasks[0], adapter.tasks)
    request = GenerationRequest(f"r{next(NUMBERS)}", (1, 2), Sampling(max_tokens=3), adapter, task_set)
    return "".join([choice.text async for output in backend.generate(request) for choice in output.choices])


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
