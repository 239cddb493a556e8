"""A backend that is replaced by another if its self-check at start shows that it computes wrong results here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from loraf_serve.backends.backend import Backend, GenerationRequest, Output, SelfCheckFailed, ServedAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Fallback(Backend):
    """Serves with `first` until it refuses an adapter by its self-check, then with `second`.

    The change happens only before the first request, and takes the adapters accepted so far along. Afterwards an
    adapter that fails the self-check is refused.

    Args:
        first: not started.
        second: makes the other backend, not started.
        say: prints for the user why the backend has changed.
    """

    def __init__(self, first: Backend, second: Callable[[], Backend], say: Callable[[str], None]):
        self._current = first
        self._second: Callable[[], Backend] | None = second
        self._say = say
        self._accepted: list[ServedAdapter] = []

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

    async def start(self) -> None:
        await self._current.start()

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        try:
            await self._current.add_adapter(adapter)
        except SelfCheckFailed as error:
            if self._second is None:
                raise
            make_second, self._second = self._second, None
            await self._fall_back(make_second(), error)
            await self._current.add_adapter(adapter)
        if self._second is not None:
            self._accepted.append(adapter)

    async def _fall_back(self, backend: Backend, error: SelfCheckFailed) -> None:
        failed, self._current = self._current, backend
        self._say(f"the {failed.name} backend failed its self-check: {error}")
        self._say(f"serving with the {self._current.name} backend instead")
        await failed.stop()
        await self._current.start()
        for adapter in self._accepted:
            await self._current.add_adapter(adapter)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        await self._current.remove_adapter(adapter)
        self._accepted = [other for other in self._accepted if other.digest != adapter.digest]

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        return self._current.adapter_bytes(adapter)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        self._second = None  # from now on a change would abort answers
        return self._current.generate(request)

    async def check_health(self) -> None:
        await self._current.check_health()

    async def stop(self) -> None:
        await self._current.stop()
