"""vLLM engines for tests, each started once per session, on small random models in float32.

The fixture `vllm_pool` is in conftest.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import (
    Backend,
    BackendUnavailable,
    ChoiceDelta,
    GenerationRequest,
    PositionLogprobs,
    Sampling,
    ServedAdapter,
)
from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend
from loraf_serve.vllm.engine.vllm_backend import VllmBackend
from tests.standins import make_model, random_checkpoint

T = TypeVar("T")
SLOTS = 3
BLOCK = 128  # tokens in a block of the prefix cache, vLLM's default on the CPU
COMMON = (
    *("--dtype", "float32", "--kv-cache-memory-bytes", str(256 << 20)),
    # The "log-probabilities" are then the logits of the whole vocabulary.
    *("--max-logprobs", "-1", "--logprobs-mode", "raw_logits"),
)
OPTIONS = (*COMMON, "--enforce-eager", "--max-loras", str(SLOTS))
# The ways in which an engine applies task sets: backend and options.
KINDS: dict[str, tuple[type[VllmBackend], tuple[str, ...]]] = {
    "slots": (SlotsBackend, OPTIONS),
    "resident": (ResidentBackend, (*COMMON, "--enforce-eager")),
    "compiled": (ResidentBackend, COMMON),
}
_ALIVE = 4  # engines at once: each takes more than a GiB


def shared(architecture: str) -> pytest.MarkDecorator:
    """Marks tests that use the pool's engines of an architecture, so that one process runs them all."""
    return pytest.mark.xdist_group(f"vllm-{architecture}")


@dataclass
class Answer:
    """One choice of an answer, assembled from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str = ""
    cached: int = 0

    def add(self, delta: ChoiceDelta) -> None:
        assert self.finish_reason is None, "a delta after the end"
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Loop:
    """An event loop in a separate thread, so that synchronous tests can use an engine that lives for the session."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 300) -> T:
        return self.submit(coroutine).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Engine:
    """A started backend with one checkpoint loaded.

    Attributes:
        kind: a key of KINDS.
        backend: created from the model's folder, vLLM's options and the largest rank.
        folder: the model.
        adapter: rank 16, tasks math, nlu and code.
    """

    def __init__(
        self,
        loop: Loop,
        kind: str,
        folder: Path,
        checkpoint: Path,
        options: Sequence[str] | None = None,
        backend: Callable[[Path, tuple[str, ...], int], Backend] | None = None,
    ):
        self.loop = loop
        self.kind = kind
        self.folder = folder
        self.adapter = open_adapter("main", checkpoint)
        usual_backend, usual_options = KINDS[kind]
        self.backend = (backend or usual_backend)(folder, tuple(options or usual_options), 16)
        loop.run(self.backend.start())
        loop.run(self.backend.add_adapter(self.adapter))

    def request(self, text: str, prompt: Sequence[int], adapter: ServedAdapter | None = None, **sampling: Any):
        """Returns a request, greedy by default, for the task set that `text` names."""
        adapter = adapter or self.adapter
        sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling
        task_set = TaskSet.parse(text, adapter.tasks)
        return GenerationRequest("r", tuple(prompt), Sampling(**sampling), adapter, task_set)

    async def answers(self, request: GenerationRequest) -> list[Answer]:
        answers = [Answer() for _ in range(request.sampling.n)]
        async with aclosing(self.backend.generate(request)) as outputs:
            async for output in outputs:
                for delta in output.choices:
                    answers[delta.index].add(delta)
                    answers[delta.index].cached = output.cached_prompt_tokens
        return answers

    def ask(self, *requests: GenerationRequest) -> list[Answer]:
        """Sends all requests at once. Returns the first choice of each."""

        async def answer_all() -> list[list[Answer]]:
            return await asyncio.gather(*(self.answers(request) for request in requests))

        return [choices[0] for choices in self.loop.run(answer_all())]

    async def busy(self) -> bool:
        """Whether vLLM's engine core or its client has an unfinished request."""
        engine = self.backend._engine
        client_busy = engine.get_num_unfinished_requests() > 0
        return client_busy or await engine.engine_core.call_utility_async("has_work")

    def sets_in_use(self) -> list[Hashable]:
        """Task sets that the backend counts as in use."""
        backend = self.backend
        return list(backend._admission.admitted if isinstance(backend, SlotsBackend) else backend._in_use)

    def alive(self) -> bool:
        try:
            self.loop.run(self.backend.check_health())
        except BackendUnavailable:
            return False
        return True


class Pool:
    """Engines by architecture and kind, started on first use, and again after a test has stopped one."""

    def __init__(self, root: Path):
        self._root = root
        self._engines: OrderedDict[tuple[str, str], Engine] = OrderedDict()
        self._loop = Loop()

    def get(self, architecture: str, kind: str = "slots") -> Engine:
        key = (architecture, kind)
        engine = self._engines.get(key)
        if engine is None or not engine.alive():
            folder, checkpoint = self._root / architecture, self._root / f"{architecture}-ckpt"
            if not folder.exists():
                make_model(architecture, folder)
                random_checkpoint(checkpoint, folder)
            while len(self._engines) >= _ALIVE:
                _, oldest = self._engines.popitem(last=False)
                self._loop.run(oldest.backend.stop())
            engine = self._engines[key] = Engine(self._loop, kind, folder, checkpoint)
        self._engines.move_to_end(key)
        return engine

    def close(self) -> None:
        async def stop_all() -> None:
            await asyncio.gather(*(engine.backend.stop() for engine in self._engines.values()))

        self._loop.run(stop_all())
        self._loop.close()


def open_adapter(name: str, folder: Path, tasks: Sequence[str] | None = None) -> ServedAdapter:
    """Reads and verifies a checkpoint completely, as the service does."""
    checkpoint = Checkpoint.open(folder, tasks)
    return ServedAdapter(name, folder, checkpoint.manifest, checkpoint)


def random_prompt(length: int, seed: int) -> list[int]:
    """Returns token ids that are different for every seed."""
    import torch

    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
