"""A backend with another to fall back on, should the first find at start that its own arithmetic is wrong here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from loraf_serve.backends.backend import Backend, GenerationRequest, Output, SelfCheckFailed, ServedAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Fallback(Backend):
    """Serves with `first`; if `first` refuses an adapter by its self-check before any request has been answered, with
    `second`, to which the adapters accepted so far go as well. Later such an adapter is refused.

    Args:
        first: not started.
        second: makes the other backend, not started.
        say: tells the user why it changed.
    """

    def __init__(self, first: Backend, second: Callable[[], Backend], say: Callable[[str], None]):
        self._now = first
        self._second: Callable[[], Backend] | None = second
        self._say = say
        self._accepted: list[ServedAdapter] = []

    @property
    def name(self) -> str:
        return self._now.name

    @property
    def reads_checkpoints(self) -> bool:
        return self._now.reads_checkpoints

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._now.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._now.max_model_len

    async def start(self) -> None:
        await self._now.start()

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        try:
            await self._now.add_adapter(adapter)
        except SelfCheckFailed as error:
            if self._second is None:
                raise
            await self._fall_back(error)
            await self._now.add_adapter(adapter)
        if self._second is not None:
            self._accepted.append(adapter)

    async def _fall_back(self, error: SelfCheckFailed) -> None:
        make, self._second = self._second, None
        failed, self._now = self._now, make()
        self._say(f"the {failed.name} backend failed its self-check: {error}")
        self._say(f"serving with the {self._now.name} backend instead")
        await failed.stop()
        await self._now.start()
        for adapter in self._accepted:
            await self._now.add_adapter(adapter)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        await self._now.remove_adapter(adapter)
        self._accepted = [other for other in self._accepted if other.digest != adapter.digest]

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        return self._now.adapter_bytes(adapter)

    def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        self._second = None  # from now on a change would end answers
        return self._now.generate(request)

    async def check_health(self) -> None:
        await self._now.check_health()

    async def stop(self) -> None:
        await self._now.stop()
