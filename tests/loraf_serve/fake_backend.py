"""A backend without a model, for tests of everything around backends."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import (
    Backend,
    BackendUnavailable,
    ChoiceDelta,
    GenerationRequest,
    Output,
    PositionLogprobs,
    ServedAdapter,
    TokenLogprob,
    UnsupportedField,
)
from tests.standins import byte_tokenizer

LETTERS = "abcdefghijklmnop"


def expected_text(request: GenerationRequest, index: int = 0) -> str:
    """The fake's answer to a request."""
    digest = request.adapter.digest if request.adapter and not request.task_set.is_base else ""
    return text_of(request.prompt_token_ids, digest, request.task_set, request.sampling.max_tokens, index)


def text_of(token_ids: tuple[int, ...], digest: str, task_set: TaskSet, tokens: int, index: int = 0) -> str:
    """One letter per token, from a hash of prompt, adapter, task set with weights, choice and position."""
    key = f"{token_ids}|{digest}|{task_set}|{index}"
    return "".join(LETTERS[hashlib.sha256(f"{key}|{i}".encode()).digest()[0] % len(LETTERS)] for i in range(tokens))


class FakeBackend(Backend):
    """Finds these bugs of a service: the wrong prompt, adapter, set or weight reaches the backend (the text differs);
    pieces are lost, doubled or mixed between choices; an iterator keeps running after its client has disconnected
    (`running`, `closed_early`); a request arrives before `start` or after `stop`; an adapter is used that was never
    added; two requests have the same id; an error becomes the wrong status; content is added twice, or removed while a
    request uses it; two changes overlap.

    Attributes:
        seconds_per_token: duration of a token.
        gate: `start` waits until it is set.
        failure: raised before the first token; failure_after: raised after two tokens.
        unsupported: name of a sampling field that it does not support.
        dead: raised by check_health.
        add_gate, remove_gate: a change waits until it is set; add_failure, remove_failure: raised after that.
        bytes_each: bytes that it reports for each content.
        history: ("add" or "remove", digest) of each successful change; `added`: digests that are held now;
            `cut_off`: a change was cancelled.
    """

    name = "fake"

    def __init__(self, seconds_per_token: float = 0.0, max_model_len: int = 256):
        self.tokenizer = byte_tokenizer()
        self.max_model_len = max_model_len
        self.end_tokens = frozenset({self.tokenizer.eos_token_id})
        self.seconds_per_token = seconds_per_token
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.failure_after: Exception | None = None
        self.unsupported = ""
        self.dead: Exception | None = None
        self.requests: list[GenerationRequest] = []
        self.running: set[str] = set()
        self.closed_early: list[str] = []
        self.state = "new"
        self.add_gate: asyncio.Event | None = None
        self.add_failure: Exception | None = None
        self.remove_gate: asyncio.Event | None = None
        self.remove_failure: Exception | None = None
        self.bytes_each = 0
        self.added: set[str] = set()
        self.history: list[tuple[str, str]] = []
        self.cut_off = False
        self._changing = False
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        assert self.state == "new"
        if self.gate:
            await self.gate.wait()
        self.state = "started"

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        async with self._change(self.add_gate, self.add_failure):
            assert adapter.digest not in self.added, "content was added twice"
            self.added.add(adapter.digest)
            self.history.append(("add", adapter.digest))

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        async with self._change(self.remove_gate, self.remove_failure):
            self.added.discard(adapter.digest)
            self.history.append(("remove", adapter.digest))

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        return self.bytes_each if adapter.digest in self.added else 0

    @asynccontextmanager
    async def _change(self, gate: asyncio.Event | None, failure: Exception | None) -> AsyncIterator[None]:
        assert self.state == "started"
        assert not self._changing, "two changes at once"
        self._changing = True
        try:
            if gate:
                await gate.wait()
            if failure:
                raise failure
            yield
        except asyncio.CancelledError:
            self.cut_off = True
            raise
        finally:
            self._changing = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        assert self.state == "started", f"a request while the backend is {self.state}"
        self._require_added(request)
        assert request.request_id not in {earlier.request_id for earlier in self.requests}
        assert 0 < len(request.prompt_token_ids) <= self.max_model_len - request.sampling.max_tokens
        if self.unsupported:
            raise UnsupportedField(self.unsupported, self.name)
        if self.failure:
            raise self.failure
        self.requests.append(request)
        self.running.add(request.request_id)
        finished = False
        try:
            for i in range(request.sampling.max_tokens):
                if self.seconds_per_token and await self._stopped_within(self.seconds_per_token):
                    yield Output(tuple(ChoiceDelta(n, "", (), "abort") for n in range(request.sampling.n)))
                    finished = True
                    return
                if self.failure_after and i == 2:
                    raise self.failure_after
                self._require_added(request)
                finished = i == request.sampling.max_tokens - 1
                prompt_logprobs = () if i else self._prompt_logprobs(request)
                pieces = tuple(self._piece(request, n, i) for n in range(request.sampling.n))
                yield Output(pieces, 1, prompt_logprobs)
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.closed_early.append(request.request_id)

    def _require_added(self, request: GenerationRequest) -> None:
        assert request.task_set.is_base or request.adapter.digest in self.added, "not there, or removed too early"

    def _piece(self, request: GenerationRequest, index: int, place: int) -> ChoiceDelta:
        letter = expected_text(request, index)[place]
        token = self.tokenizer.convert_tokens_to_ids(letter)
        entry = TokenLogprob(token, -0.5, 1, letter)
        wanted = request.sampling.logprobs
        logprobs = () if wanted is None else (PositionLogprobs(entry, (entry,) * wanted),)
        finish = "length" if place == request.sampling.max_tokens - 1 else None
        return ChoiceDelta(index, letter, (token,), finish, "", logprobs)

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[PositionLogprobs | None, ...]:
        """For each token the logarithm -1, -2, …"""
        wanted = request.sampling.prompt_logprobs
        if wanted is None:
            return ()
        entries = [TokenLogprob(token, -float(i), 1, "") for i, token in enumerate(request.prompt_token_ids)]
        return (None, *(PositionLogprobs(entry, (entry,) * wanted) for entry in entries[1:]))

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def check_health(self) -> None:
        if self.dead:
            raise self.dead

    async def stop(self) -> None:
        self.state = "stopped"
        self._stopping.set()


class ReadingBackend(FakeBackend):
    """Reads and verifies the task files itself, as vLLM's workers do.

    Finds this bug of a service: it reads values that only the backend needs.
    """

    reads_checkpoints = True

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        assert adapter.checkpoint is None
        Checkpoint.open(adapter.path, adapter.tasks).verify_projection()
        await super().add_adapter(adapter)


GONE = BackendUnavailable("engine core died at /srv/secret/engine.py")
