"""A backend that is replaced by another if it turns out at start that it computes, or might compute, wrong results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING

from loraf.errors import LorafError
from loraf_serve.backends.backend import (
    Backend,
    EngineFailed,
    GenerationRequest,
    NotProven,
    Output,
    SelfCheckFailed,
    ServedAdapter,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Fallback(Backend):
    """Serves with `first` until it fails to start, or refuses an adapter, with an error that another backend stands
    ready for.

    The change happens only before the first request, and takes the adapters accepted so far along. Afterwards the
    adapter is refused.

    Args:
        first: not started.
        others: error → makes the backend to use after it, not started.
        say: prints for the user why the backend has changed.
        read_values: reads an adapter's values, for a backend that does not read checkpoints itself.
    """

    def __init__(
        self,
        first: Backend,
        others: Mapping[type[LorafError], Callable[[LorafError], Backend]],
        say: Callable[[str], None],
        read_values: Callable[[ServedAdapter], ServedAdapter],
    ):
        self._current = first
        self._others = dict(others)
        self._say = say
        self._read_values = read_values
        self._accepted: list[ServedAdapter] = []
        self._values_bytes: dict[str, int] = {}  # digest → bytes of the values that were read here

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here: it follows the current backend
        return self._current.name

    @property
    def reads_checkpoints(self) -> bool:  # type: ignore[override]  # as above
        return self._current.reads_checkpoints

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]  # as above
        return self._current.tokenizer

    @property
    def max_model_len(self) -> int:  # type: ignore[override]  # as above
        return self._current.max_model_len

    @property
    def vocab_size(self) -> int | None:  # type: ignore[override]  # as above
        return self._current.vocab_size

    @property
    def end_tokens(self) -> frozenset[int]:  # type: ignore[override]  # as above
        return self._current.end_tokens

    @property
    def unsupported_fields(self) -> tuple[str, ...]:  # type: ignore[override]  # as above
        return self._current.unsupported_fields

    async def start(self) -> None:
        self._current.keeps_metrics = self.keeps_metrics
        try:
            await self._current.start()
        except LorafError as error:
            await self._fall_back(error)

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        while True:
            try:
                await self._add(adapter)
                break
            except LorafError as error:
                await self._fall_back(error)
        if self._others:
            self._accepted.append(adapter)

    async def _add(self, adapter: ServedAdapter) -> None:
        if adapter.checkpoint is None and not self._current.reads_checkpoints:
            adapter = await asyncio.to_thread(self._read_values, adapter)
            self._values_bytes[adapter.digest] = adapter.resident_bytes
        await self._current.add_adapter(adapter)

    async def _fall_back(self, error: LorafError) -> None:
        """Raises `error` if no other backend stands ready for it."""
        kind = next((kind for kind in self._others if isinstance(error, kind)), None)
        if kind is None:
            raise error
        backend = self._others.pop(kind)(error)
        failed, self._current = self._current, backend
        self._say(f"the {failed.name} backend {_what_failed(error)}: {error}")
        turns = ", which serves one task set at a time: sets take turns" if backend.name == "merged" else ""
        self._say(f"serving with the {backend.name} backend instead{turns}")
        await failed.stop()
        self._current.keeps_metrics = self.keeps_metrics
        await self._current.start()
        for adapter in self._accepted:
            await self._add(adapter)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        await self._current.remove_adapter(adapter)
        self._accepted = [other for other in self._accepted if other.digest != adapter.digest]
        self._values_bytes.pop(adapter.digest, None)

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        return self._current.adapter_bytes(adapter) + self._values_bytes.get(adapter.digest, 0)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        return self.settled().generate(request)

    @property
    def current(self) -> Backend:
        """The backend that serves now."""
        return self._current

    def settled(self) -> Backend:
        """The backend that serves, for good: from the first request on, a change would abort answers."""
        self._others.clear()
        return self._current

    async def check_health(self) -> None:
        await self._current.check_health()

    async def stop(self) -> None:
        await self._current.stop()


def _what_failed(error: LorafError) -> str:
    if isinstance(error, SelfCheckFailed):
        return "failed its self-check"
    if isinstance(error, EngineFailed):
        return "did not start"
    if isinstance(error, NotProven):
        return "is not proven to answer as transformers would"
    return "cannot serve an adapter"
