"""From a gRPC call to the pieces of its answer, or to the status that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.errors import DeadlineExceeded
from loraf_serve.observe.call import Call, current
from loraf_serve.security.allowance import Allowance
from loraf_serve.security.permissions import Permissions
from loraf_serve.service.gate import PERMISSIONS
from loraf_serve.service.generations import Generations
from loraf_serve.service.refusal import Context, Refusal, refusal_of
from loraf_serve.v1 import generation_pb2 as pb

Emit = Callable[[pb.StreamGenerateResponse], Awaitable[None]]
Pieces = Callable[[GenerationRequest, Call, Allowance], AsyncGenerator[pb.StreamGenerateResponse]]


@dataclass(frozen=True)
class Question:
    """What one call asks, whichever contract it was written in.

    Attributes:
        adapter: its name in the request; "" for the only one.
        read: validates the request, given the adapters that its client may use.
        prompt: makes the text that observers may see.
        shown: an error → the error with the fields that the client knows.
        pieces: how the backend is asked; None: by `Generations.pieces`.
    """

    adapter: str
    read: Callable[[Registry, Permissions], Awaitable[GenerationRequest]]
    prompt: Callable[[], str]
    shown: Callable[[Exception], Exception] = lambda error: error
    pieces: Pieces | None = None


async def answer(
    generations: Generations,
    default_deadline: float | None,
    question: Question,
    context: Context,
    emit: Emit,
    sending: AbstractAsyncContextManager[object],
) -> Refusal | None:
    """Passes the pieces of the answer to `emit`, within `sending`. Returns the status if anything is wrong.

    Args:
        default_deadline: seconds, for a call that sets no deadline; None for no limit.
    """
    call, permissions = current(), PERMISSIONS.get()
    make_pieces = question.pieces or generations.pieces
    # The client's own deadline reaches this handler as a cancellation.
    deadline = default_deadline if context.time_remaining() is None else None
    try:
        async with asyncio.timeout(deadline) as timeout:
            with generations.entered(question.adapter, permissions) as (registry, (allowance,)):
                valid = await question.read(registry, permissions)
                generations.begin(valid, allowance)
                generations.note_request(call, [valid], question.prompt)
                async with sending, aclosing(make_pieces(valid, call, allowance)) as pieces:
                    async for piece in pieces:
                        await emit(piece)
    except TimeoutError as error:
        if deadline is not None and timeout.expired():
            return refusal_of(DeadlineExceeded(deadline), call.request_id)
        return refusal_of(error, call.request_id)
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise  # the client's deadline has passed, or it cancelled the call, or it is gone
        return refusal_of(error, call.request_id)  # this call was not cancelled: an internal fault
    except Exception as error:
        return refusal_of(question.shown(await generations.shown(error, permissions)), call.request_id)
    return None


def is_cancelled() -> bool:
    """Whether the current task has been cancelled, rather than something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
