"""The merged backend at work: turns, memory, cancellation, failures, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import threading

import pytest
import torch

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.delta import OriginalWeights
from loraf.errors import BaseMismatch, ConfigError
from loraf.tasksets import TaskSet
from loraf_serve.backends import merged_engine
from loraf_serve.backends.backend import BackendUnavailable, ChoiceDelta, GenerationRequest, Output
from loraf_serve.backends.merged import MergedBackend
from loraf_serve.backends.model_runner import Forward
from loraf_serve.backends.output_queue import OutputQueue
from loraf_serve.backends.sampler import Sampler
from tests.loraf_serve.merged_stand import GREEDY, PROMPTS, SETS, Stand, only, served
from tests.standins import random_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="module")
def stand(folder):
    stand = Stand("mistral", folder / "one", turn_steps=5)
    yield stand
    stand.close()


def drained(engine: merged_engine.Engine) -> bool:
    return engine._reserved == 0 and not any(group.jobs for group in engine._groups.values())


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


# Turns


def test_a_lower_priority_number_goes_first(stand):
    """Whether the requests are for one task set or for several."""
    order = []

    async def ask(name: str, task_set: str, priority: int, tokens: int) -> None:
        sampling = dataclasses.replace(GREEDY, max_tokens=tokens, ignore_eos=True, n=1)
        request = dataclasses.replace(stand.request("Hello", task_set, sampling), priority=priority)
        async for _ in stand.backend.generate(request):
            if name not in order:
                order.append(name)

    async def all_of_them(task_sets):
        order.clear()
        running = [asyncio.create_task(ask(f"running {i}", "math", 0, 60)) for i in range(merged_engine.MAX_ROWS)]
        await until(lambda: len(order) == len(running))
        waiting = []
        for (name, priority), task_set in zip((("last", 5), ("normal", 0), ("first", -5)), task_sets, strict=True):
            waiting.append(asyncio.create_task(ask(name, task_set, priority, 2)))
            await asyncio.sleep(0)
        await asyncio.gather(*running, *waiting)
        return order[len(running) :]

    assert stand.run(all_of_them(("math", "math", "math"))) == ["first", "normal", "last"]
    assert stand.run(all_of_them(("nlu", "code", "math+code"))) == ["first", "normal", "last"]


def test_a_long_answer_does_not_keep_other_sets_waiting(stand):
    long = dataclasses.replace(GREEDY, max_tokens=300, ignore_eos=True)
    short = dataclasses.replace(GREEDY, max_tokens=12, ignore_eos=True)
    order, seen = [], {"long": 0}

    async def run_long(started: asyncio.Event):
        tokens = ()
        async for output in stand.backend.generate(stand.request("Hello", "math", long)):
            tokens += output.choices[0].token_ids
            seen["long"] = len(tokens)
            started.set()
        order.append("long")
        return tokens

    async def run_short(task_set, started):
        await started.wait()
        before = seen["long"]
        answer = only(await stand.ask("x", task_set, short))
        order.append(task_set)
        return answer.token_ids, seen["long"] - before

    async def all_of_them():
        started = asyncio.Event()
        return await asyncio.gather(run_long(started), run_short("nlu", started), run_short("base", started))

    tokens, (nlu, waited_nlu), (base, waited_base) = stand.run(all_of_them())
    assert order[-1] == "long" and len(tokens) == 300
    # 12 tokens and a prompt are three turns of five steps each; one more turn of the long one may have begun.
    assert max(waited_nlu, waited_base) < 100
    assert tokens[:12] == stand.expected("Hello", "math", 12), "pausing changed the answer"
    assert (nlu, base) == (stand.expected("x", "nlu", 12), stand.expected("x", "base", 12))


def test_requests_for_one_set_are_decoded_together(stand, monkeypatch):
    rows = []
    forward = Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda self, t, *rest: rows.append(len(t)) or forward(self, t, *rest))
    same = dataclasses.replace(GREEDY, ignore_eos=True)
    stand.answers(*((prompt, "nlu", same) for prompt in PROMPTS))
    assert max(rows) == len(PROMPTS)
    assert len(rows) < 12 * len(PROMPTS) / 2


def test_memory_for_the_kv_cache_is_never_exceeded_and_all_are_answered_in_order(stand, monkeypatch):
    engine = stand.backend._engine
    engine.call(lambda: engine._ready() and None).result(10)  # drops the groups of earlier tests and their turns
    reserved, started = [], []
    prefill = merged_engine.Engine._prefill

    def watching(self, group, job, work):
        reserved.append(self._reserved)
        started.append(job.arrival)
        return prefill(self, group, job, work)

    monkeypatch.setattr(merged_engine.Engine, "_prefill", watching)
    need = max(len(stand.ids(prompt)) for prompt in PROMPTS) + 12
    monkeypatch.setattr(engine, "_kv_tokens", 2 * need)
    asked = list(zip(itertools.cycle(PROMPTS), SETS, strict=False))
    # One alone may exceed it: it runs when nothing else does. It ends long before it has used what it may use.
    soon = {"min_tokens": 5, "logit_bias": {2: 100.0}}
    asked.insert(2, ("x", "base", dataclasses.replace(GREEDY, max_tokens=5 * need, **soon)))
    answers = stand.answers(*asked)
    assert all(only(each).finish_reason for each in answers)
    assert max(r for r in reserved if r <= 2 * need) > need, "requests should have run side by side"
    assert [r for r in reserved if r > 2 * need] == [len(stand.ids("x")) + 5 * need]
    assert engine._reserved == 0
    assert started == sorted(started), "a younger request took the memory that an older one waits for"


# Ends


def test_closing_or_cancelling_ends_the_work(stand):
    long = dataclasses.replace(GREEDY, max_tokens=900, ignore_eos=True)
    engine = stand.backend._engine

    async def close():
        outputs = stand.backend.generate(stand.request("Hello", "math", long))
        await anext(outputs)
        waiting = asyncio.create_task(stand.ask("x", "nlu", long))  # cancelled at any moment of its life
        running = asyncio.create_task(stand.ask("x", "math", long))
        await asyncio.sleep(0.02)
        waiting.cancel()
        running.cancel()
        await outputs.aclose()
        await until(lambda: drained(engine))

    stand.run(close())
    assert only(stand.answers(("Hello", "math"))[0]).token_ids == stand.expected("Hello", "math", 12)


def test_a_failure_fails_its_request_and_no_other(stand, monkeypatch, caplog):
    choose = Sampler.__call__

    def failing(self, logits, output):
        if self._sampling.seed == 666 and len(output) == 3:
            raise ValueError("a fault")
        return choose(self, logits, output)

    monkeypatch.setattr(Sampler, "__call__", failing)

    async def all_of_them():
        bad = stand.ask("x", "math", dataclasses.replace(GREEDY, seed=666))
        return await asyncio.gather(stand.ask("Hello", "math"), bad, stand.ask("a b c", "math"), return_exceptions=True)

    good, bad, other = stand.run(all_of_them())
    assert isinstance(bad, RuntimeError) and isinstance(bad.__cause__, ValueError)
    assert only(good).token_ids == stand.expected("Hello", "math", 12)
    assert only(other).token_ids == stand.expected("a b c", "math", 12)
    assert "request r failed" in caplog.text
    assert drained(stand.backend._engine)


def test_after_a_failing_step_or_merge_the_next_request_is_answered_exactly(stand, monkeypatch):
    forward, add = Forward.__call__, OriginalWeights.add
    calls = itertools.count()

    def fails_once(real):
        def call(*arguments):
            if next(calls) == 4:
                raise torch.OutOfMemoryError("out of memory")
            return real(*arguments)

        return call

    for target, name, real in ((Forward, "__call__", forward), (OriginalWeights, "add", add)):
        calls = itertools.count()
        stand.answers(("x", "base"))
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails_once(real))
            with pytest.raises(RuntimeError, match="OutOfMemoryError"):
                stand.answers(("Hello", "math+code"))
            assert next(calls) > 4, "the fault was not met"
            assert only(stand.answers(("Hello", "math+code"))[0]).token_ids == stand.expected("Hello", "math+code", 12)
        stand.run(stand.backend.check_health())


def broken(stand) -> MergedBackend:
    """A second backend over the stand's model, started."""
    backend = MergedBackend(stand.model_folder, "float32")
    stand.run(backend.start())
    return backend


def test_a_model_that_stays_broken_is_reported(stand, monkeypatch):
    backend = broken(stand)

    def dead(*arguments):
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def ask():
        return [o async for o in backend.generate(GenerationRequest("r", (1, 9), GREEDY, None, TaskSet()))]

    stand.run(backend.check_health())
    monkeypatch.setattr(Forward, "__call__", dead)
    with pytest.raises(RuntimeError, match="decoding failed"):
        stand.run(ask())
    backend._engine._thread.join(10)
    with pytest.raises(BackendUnavailable, match="the model has failed"):
        stand.run(backend.check_health())
    with pytest.raises(BackendUnavailable):
        stand.run(ask())
    stand.run(backend.stop())


def test_stop_ends_waiting_and_running_requests(stand):
    backend = broken(stand)

    async def stop():
        sampling = dataclasses.replace(GREEDY, max_tokens=900, ignore_eos=True)
        request = GenerationRequest("r", (1, 9), sampling, None, TaskSet())
        read = asyncio.Event()

        async def ask():
            async for _ in backend.generate(request):
                read.set()

        asked = [asyncio.create_task(ask()) for _ in range(20)]  # more than are decoded together
        await read.wait()
        await asyncio.gather(backend.stop(), backend.stop())
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(end, BackendUnavailable) for end in ends), ends
        with pytest.raises(BackendUnavailable):
            await ask()
        with pytest.raises(BackendUnavailable):
            await backend.check_health()

    threads = threading.active_count()
    stand.run(stop())
    assert threading.active_count() < threads


def test_a_slow_reader_costs_at_most_its_answer_and_delays_no_other(stand):
    long = dataclasses.replace(GREEDY, max_tokens=60, ignore_eos=True)

    async def slow():
        outputs = stand.backend.generate(stand.request("Hello", "math", long))
        first = await anext(outputs)
        await stand.ask("Hello", "math", long)  # as long, begun later: the unread one has ended by then
        await until(lambda: drained(stand.backend._engine))
        return first, [output async for output in outputs]

    first, rest = stand.run(slow())
    tokens = first.choices[0].token_ids + rest[0].choices[0].token_ids
    assert len(rest) == 1 and len(tokens) == 60
    assert tokens[:12] == stand.expected("Hello", "math", 12)
    assert rest[0].choices[0].finish_reason == "length"


def test_the_loop_is_not_blocked_while_the_model_runs(stand):
    async def ticking():
        task = asyncio.create_task(stand.ask("Hello", "math", dataclasses.replace(GREEDY, max_tokens=40)))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert stand.run(ticking()) > 10


def test_the_queue_joins_unread_outputs_and_raises_after_them():
    async def read():
        queue = OutputQueue()
        for i in range(3):
            queue.put([ChoiceDelta(1, "b", (i,)), ChoiceDelta(0, "a", (i,), "stop" if i == 2 else None)])
        queue.end(ValueError("late"))
        output = await queue.get()
        with pytest.raises(ValueError, match="late"):
            await queue.get()
        return output

    b, a = ChoiceDelta(1, "bbb", (0, 1, 2)), ChoiceDelta(0, "aaa", (0, 1, 2), "stop")
    assert asyncio.run(read()) == Output((b, a))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "'int3' is not a dtype"),
        ({"max_model_len": 5000}, "5000 is out of range"),
        ({"max_model_len": 1}, "1 is out of range"),
    ],
)
def test_start_refuses_wrong_options_by_name(stand, options, message):
    with pytest.raises(ConfigError, match=message):
        asyncio.run(MergedBackend(stand.model_folder, **options).start())


def test_start_refuses_a_folder_without_weights_or_with_weights_missing(stand, folder):
    from safetensors.torch import load_file, save_file

    for name in ("empty", "partial"):
        shutil.copytree(stand.model_folder, folder / name)
    (folder / "empty/model.safetensors").unlink()
    weights = load_file(folder / "partial/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "partial/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"empty: has no model.safetensors"):
        asyncio.run(MergedBackend(folder / "empty").start())
    with pytest.raises(ConfigError, match=r"lacks weights of the model: .*up_proj"):
        asyncio.run(MergedBackend(folder / "partial").start())


def test_an_adapter_for_another_model_is_refused_and_nothing_changes(stand, folder):
    shapes = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.9.self_attn.q_proj": (128, 128)}
    base = describe(str(stand.model_folder), stand.model_folder)
    other = Checkpoint.create(folder / "other", base, 8, shapes, seed=9)
    other.add_task("t", random_values(shapes, 8, ["t"], 0.5, 4)["t"], alpha=16.0, sparsity=0.5)
    with pytest.raises(BaseMismatch) as refused:
        stand.run(stand.backend.add_adapter(served(other, "first")))
    assert len(refused.value.problems) == 2
    assert only(stand.answers(("Hello", "math"))[0]).token_ids == stand.expected("Hello", "math", 12)


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ((1, 400), {}),
        ((1,) * 1024, {}),
        ((), {}),
        ((1,), {"logit_bias": {320: 1.0}}),
        ((1,), {"stop_token_ids": (-1,)}),
    ],
)
def test_token_ids_out_of_range_never_reach_the_model(stand, prompt, fields):
    request = GenerationRequest("r", prompt, dataclasses.replace(GREEDY, **fields), None, TaskSet())

    async def ask():
        return [o async for o in stand.backend.generate(request)]

    with pytest.raises(ValueError, match="vocabulary|tokens"):
        stand.run(ask())
