"""What the service has found out of a request before vLLM's app gets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

from vllm.exceptions import GracefulHTTPError

from loraf_serve.backends.backend import GenerationRequest

T = TypeVar("T")
_POLL_SECONDS = 0.01


@dataclass
class Admitted:
    """A request that the service has admitted. Its adapter stays in the backend until `end`.

    Attributes:
        model: the name of the model as the client wrote it.
        fingerprint: names what answers; see `loraf_serve.request.names`.
        requests: one for each prompt; empty for a chat that the app renders, until it is rendered.
        texts: of each prompt, for an answer that repeats it; None where it is not known as text.
        rendered: validates the token ids of a chat that the app has rendered. Raises LorafError or Refused.
        tokens: is told of new tokens: the prompt's place, their number, the tokens of the prompt that were in the
            cache, and the new text of the first answer.
        form: of the answer, as `FormChecker.check` returned it; None for any.
        error: what the request has failed with.
        inputs: the prompts as the app passes them to the engine.
    """

    model: str
    fingerprint: str
    requests: list[GenerationRequest]
    texts: Sequence[str | None]
    rendered: Callable[[Sequence[int]], GenerationRequest]
    tokens: Callable[[int, int, int, str], None]
    form: tuple[str, str] | None = None
    error: Exception | None = None
    inputs: list[Any] = field(default_factory=list)
    _works: list[_Work] = field(default_factory=list)

    def failed(self, error: Exception) -> Exception:
        """Keeps why the request has failed. Returns what is to be raised through vLLM's app."""
        self.error = self.error or error
        return GracefulHTTPError("the request has failed", HTTPStatus.INTERNAL_SERVER_ERROR)

    async def running(self, answers: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yields the answers to one of the prompts; until it ends or is closed, the engine counts as at work on it."""
        task = _Work(answers)
        self._works.append(task)
        try:
            async for answer in answers:
                yield answer
        finally:
            await task.end()
            self._works.remove(task)

    async def end(self) -> None:
        """Ends the engine's work on the request, and waits for that: when a client is gone, the app's call may be over
        before."""
        for work in list(self._works):
            await work.end()


class _Work:
    """The engine's work on one prompt."""

    def __init__(self, answers: AsyncGenerator[Any, None]):
        self._answers: Any = answers  # its frame has no type

    async def end(self) -> None:
        """Closes the generator; if somebody else is about to, waits for that."""
        while self._answers.ag_frame is not None:
            try:
                await self._answers.aclose()
            except RuntimeError:  # it runs: a cancellation is on its way to it
                await asyncio.sleep(_POLL_SECONDS)


ADMITTED: ContextVar[Admitted] = ContextVar("admitted")
"""The request that the running task of the app answers."""
