"""AsyncClient: the same methods as Client, many streams at once, cancellation; both inside a running loop."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from loraf_serve.client import AsyncClient, Client
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, serving

STREAMS = 100
SETS = ({}, {"tasks": {"math": 1, "nlu": 0.5}}, {"as_trained": "nlu"}, {"base": True})


def test_both_clients_have_the_same_methods():
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(kind, callable)
            if not name.startswith("_")
        }

    assert methods(AsyncClient) == methods(Client)
    assert inspect.signature(AsyncClient) == inspect.signature(Client)


def test_a_hundred_streams_at_once_do_not_mix():
    async def ask(client: AsyncClient, number: int) -> str:
        request = {"prompt_token_ids": [5 + number, 7], "max_tokens": 8, **SETS[number % len(SETS)]}
        return "".join([str(piece) async for piece in client.stream(**request)])

    async def ask_all(address: str) -> list[str]:
        async with AsyncClient(address) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(STREAMS)))

    with serving(FakeBackend(seconds_per_token=0.02)) as running:
        texts = asyncio.run(ask_all(running.address))
        passed = {request.prompt_token_ids[0] - 5: request for request in running.backend.requests}
        assert sorted(passed) == list(range(STREAMS)) and not running.backend.closed_early
        assert texts == [expected_text(passed[number]) for number in range(STREAMS)]


@pytest.mark.parametrize("how", ["break", "cancel the task", "close the stream", "close the client"])
def test_what_nobody_reads_any_more_is_cancelled(how):
    async def leave(address: str, backend: FakeBackend) -> None:
        async with AsyncClient(address) as client:
            stream = client.stream("x", max_tokens=200)
            await anext(stream)
            assert backend.running
            if how == "break":
                async for _ in client.stream("x", max_tokens=200):
                    break
                del stream
            elif how == "cancel the task":
                task = asyncio.create_task(stream.answer())
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "close the stream":
                await stream.aclose()
            else:
                await client.close()
            for _ in range(300):
                if not backend.running:
                    return
                await asyncio.sleep(0.01)

    with serving(FakeBackend(seconds_per_token=0.05)) as running:
        asyncio.run(leave(running.address, running.backend))
        assert not running.backend.running and running.backend.closed_early


def test_a_cancelled_answer_is_not_generated_further():
    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate("x", max_tokens=200), 0.3)

    with serving(FakeBackend(seconds_per_token=0.05)) as running:
        asyncio.run(ask(running.address))
        assert eventually(lambda: not running.backend.running, 2)


def test_both_clients_work_inside_a_running_loop_as_in_a_notebook():
    with serving() as running:

        async def cell() -> tuple[str, str, str]:
            waiting = Client(running.address)
            one = waiting.generate("hello", max_tokens=4).text
            two = "".join(str(piece) for piece in waiting.stream("hello", max_tokens=4))
            waiting.close()
            client = AsyncClient(running.address)
            three = (await client.generate("hello", max_tokens=4)).text
            await client.close()
            return one, two, three

        one, two, three = asyncio.run(cell())
        assert one == two == three == expected_text(running.backend.requests[-1])


def test_a_client_may_be_made_before_there_is_a_loop():
    with serving() as running:
        client = AsyncClient(running.address)

        async def ask() -> str:
            async with client:
                await client.wait_until_serving(5)
                return (await client.generate("hello")).text

        assert asyncio.run(ask())
