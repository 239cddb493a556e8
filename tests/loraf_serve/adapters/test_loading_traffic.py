"""Adapters are loaded, replaced and unloaded under one name with other contents while requests run: every answer is of
the content that it says it is of, and nothing stays in memory."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.merged import MergedBackend
from loraf_serve.client import ServiceError, request_of
from loraf_serve.service import refusal
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend, text_of
from tests.loraf_serve.harness import (
    Running,
    checkpoint_folder,
    checkpoints_root,
    eventually,
    model_folder,
    open_adapter,
    serving,
)
from tests.loraf_serve.library_stand import check_history
from tests.loraf_serve.references import Merged

CONTENTS = (("ckpt0", ()), ("ckpt1", ()), ("ckpt0", ("math",)), ("ckpt1", ("math", "code")))
NAMES = ("a", "b")
PROMPTS = ("Hello", "2 + 3 =", "x")
SELECTIONS = ({}, {"tasks": {"math": 0.5}}, {"as_trained": "math"}, {"base": True})


@pytest.fixture
def opened(monkeypatch):
    """Every checkpoint that is read from now on, as long as somebody holds it."""
    found: weakref.WeakSet = weakref.WeakSet()
    original = AdapterRoot.open

    def noting(*arguments):
        adapter = original(*arguments)
        found.add(adapter.checkpoint)
        return adapter

    monkeypatch.setattr(AdapterRoot, "open", noting)
    return found


def change(running: Running, rounds: int, pause: float) -> Counter[str]:
    """Loads, replaces and unloads at random. Returns how often each happened."""
    rng, done, there = random.Random(5), Counter(), set()
    while sum(done.values()) < rounds:
        name, (path, tasks) = rng.choice(NAMES), rng.choice(CONTENTS)
        if name in there and rng.random() < 0.25:
            running.client.unload_adapter(name)
            there.remove(name)
            done["unload"] += 1
        else:
            running.client.load_adapter(name, path, tasks, replace=name in there)
            done["replace" if name in there else "load"] += 1
            there.add(name)
        time.sleep(rng.random() * pause)
    for name in there:
        running.client.unload_adapter(name)
    return done


def ask_until(running: Running, over: threading.Event, seed: int, tokens: int) -> list[tuple[str, str, str, tuple]]:
    """(prompt, digest, task set, token ids) of answers to random requests; some are cancelled on the way."""
    rng, answers = random.Random(seed), []
    while not over.is_set():
        prompt, selection = rng.choice(PROMPTS), rng.choice(SELECTIONS)
        length = rng.randint(1, tokens)
        request = request_of(
            pb.StreamGenerateRequest,
            prompt,
            adapter=rng.choice(NAMES),
            max_tokens=length,
            temperature=0,
            ignore_eos=True,
            **selection,
        )
        call = running.generation.StreamGenerate(request)
        pieces, cancelled_after = [], rng.choice([1, None, None, None])
        try:
            for piece in call:
                pieces.append(piece)
                if len(pieces) == cancelled_after:
                    call.cancel()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                assert not pieces  # never in the middle of an answer
                time.sleep(0.002)
                continue
            assert error.code() is grpc.StatusCode.CANCELLED and cancelled_after, error
            continue
        first, last = pieces[0].served_by, pieces[-1].served_by
        assert first == last
        task_set = TaskSet(tuple((task.name, task.weight) for task in last.tasks))
        ids = tuple(token for piece in pieces for token in piece.choices[0].token_ids)
        assert len(ids) == length
        answers.append((prompt, last.digest, str(task_set), ids))
    return answers


def under_traffic(running: Running, clients: int, rounds: int, tokens: int, pause: float):
    over = threading.Event()
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask_until, running, over, seed, tokens) for seed in range(clients)]
        try:
            done = change(running, rounds, pause)
        finally:
            over.set()
        return done, [answer for each in asking for answer in each.result(60)]


def check(done: Counter[str], answers: list, right: Callable[[str, str, str, int], tuple[int, ...]]) -> None:
    """Every answer is right, and the test has seen enough of everything."""
    for prompt, digest, task_set, ids in answers:
        assert ids == right(prompt, digest, task_set, len(ids)), (prompt, digest, task_set)
    assert all(done[what] > 0 for what in ("load", "replace", "unload"))
    digests = Counter(digest for _, digest, task_set, _ in answers if task_set != "base")
    assert len(digests) == len(CONTENTS), digests


def gone(checkpoints: weakref.WeakSet) -> bool:
    gc.collect()
    return not checkpoints


def test_two_hundred_changes_under_traffic_with_the_fake_backend(opened):
    for seed in (0, 1):
        checkpoint_folder(seed)
    backend = FakeBackend(seconds_per_token=0.002)
    with serving(backend, adapters=Registry(), root=checkpoints_root()) as running:
        done, answers = under_traffic(running, clients=8, rounds=200, tokens=24, pause=0.03)
        assert sum(done.values()) == 200
        assert eventually(lambda: backend.added == set())
        check_history(backend)
        assert not backend.running and not running.server._library._leases and not running.server._library._held
        encode = backend.tokenizer

        def right(prompt: str, digest: str, task_set: str, tokens: int) -> tuple[int, ...]:
            key = "" if task_set == "base" else digest
            return tuple(
                encode.convert_tokens_to_ids(list(text_of(tuple(encode(prompt)["input_ids"]), key, task_set, tokens)))
            )

        check(done, answers, right)
        backend.requests.clear()
        assert eventually(lambda: gone(opened))


@pytest.mark.parametrize(
    "refused",
    [
        lambda running: running.client.generate("x", adapter="b"),
        lambda running: running.client.generate("x", adapter="a", tasks={"unknown": 1.0}),
        lambda running: running.client.generate("", adapter="a", temperature=-1.0),
        lambda running: running.client.load_adapter("a", "ckpt1"),
        lambda running: running.client.load_adapter("a", "nowhere", replace=True),
        lambda running: running.client.unload_adapter("b"),
        lambda running: running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="b")),
    ],
)
def test_the_latest_call_keeps_no_adapter_when_it_is_refused(opened, refused):
    checkpoint_folder(0)
    with serving(FakeBackend(), adapters=Registry(), root=checkpoints_root()) as running:
        running.client.load_adapter("a", "ckpt0")
        with pytest.raises((ServiceError, grpc.RpcError)):
            refused(running)
        running.call(running.server._library.unload("a"))  # not over gRPC: that would be a later call
        assert eventually(lambda: gone(opened))


def test_the_latest_call_keeps_no_adapter_when_the_backend_fails(opened, monkeypatch):
    monkeypatch.setattr(refusal.log, "disabled", True)  # pytest keeps the exceptions that are logged
    checkpoint_folder(0)
    backend = FakeBackend()
    backend.failure_after = RuntimeError("in the middle of an answer")
    with serving(backend, adapters=Registry(), root=checkpoints_root()) as running:
        running.client.load_adapter("a", "ckpt0")
        with pytest.raises(ServiceError, match="INTERNAL"):
            running.client.generate("x", adapter="a", max_tokens=4)
        backend.failure_after = None
        backend.requests.clear()
        running.call(running.server._library.unload("a"))
        assert eventually(lambda: gone(opened))


def test_changes_under_traffic_with_merged_weights(opened):
    """In float32: the tokens are those of weights merged in transformers, whatever was replaced meanwhile."""
    checkpoints = {}
    for seed in (0, 1):
        for path, tasks in CONTENTS:
            if path == f"ckpt{seed}":
                adapter = open_adapter("x", checkpoint_folder(seed), tasks or None)
                checkpoints[adapter.digest] = adapter.checkpoint
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        backend = MergedBackend(model_folder(), "float32", turn_steps=4)
        with serving(backend, adapters=Registry(), root=checkpoints_root()) as running:
            done, answers = under_traffic(running, clients=4, rounds=40, tokens=8, pause=0.2)
            assert eventually(lambda: not running.server._library._held)
            assert backend._weights._mergers == {} and backend._weights._originals.resident_bytes == 0
            references = {digest: Merged(model_folder(), checkpoint) for digest, checkpoint in checkpoints.items()}
            known: dict[tuple, tuple[int, ...]] = {}

            def right(prompt: str, digest: str, task_set: str, tokens: int) -> tuple[int, ...]:
                key = (prompt, digest, task_set)
                if key not in known:
                    prompt_ids = backend.tokenizer(prompt)["input_ids"]
                    known[key] = tuple(references[digest].greedy(task_set, prompt_ids, 8))
                return known[key][:tokens]

            check(done, answers, right)
            assert eventually(lambda: gone(opened))
            with pytest.raises(ServiceError, match="NOT_FOUND"):
                running.client.generate("x", adapter="a")
    finally:
        torch.set_num_threads(threads)
