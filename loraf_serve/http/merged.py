"""Answers of a backend that does not run vLLM, in OpenAI's form.

Generations.pieces (gRPC's messages) ──▶ Form ──▶ one JSON object, or server-sent events
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.errors import ReadsTooSlowly
from loraf_serve.http.asked import Asked
from loraf_serve.http.errors import answer_of
from loraf_serve.http.exchange import ClientGone, Exchange, Part
from loraf_serve.request import names
from loraf_serve.security.allowance import Allowance
from loraf_serve.security.permissions import Permissions
from loraf_serve.service.doors import Inside
from loraf_serve.service.messages import ResponseBuilder
from loraf_serve.service.outbox import Outbox
from loraf_serve.v1 import generation_pb2 as pb

_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length", pb.FINISH_REASON_ABORTED: "abort"}
_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)
_LEAST = -9999.0  # JSON has no -inf


async def answer(
    inside: Inside, exchange: Exchange, asked: Asked, allowances: Sequence[Allowance], valid: list[GenerationRequest]
) -> None:
    """Answers an admitted request; its prompts at the same time.

    Args:
        valid: one for each prompt.
    """
    form = _Form(asked, valid[0], exchange.call.request_id)
    queue: asyncio.Queue[tuple[int, pb.StreamGenerateResponse] | None] = asyncio.Queue()

    async def generate(place: int) -> None:
        pieces = inside.generations.pieces(valid[place], exchange.call, allowances[place])
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait((place, piece))

    async def generate_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for place in range(len(valid)):
                    group.create_task(generate(place))
        finally:
            queue.put_nowait(None)

    generating = asyncio.create_task(generate_all())
    builders = [ResponseBuilder() for _ in valid]
    try:
        async with exchange.parts() as parts:
            while (next_piece := await queue.get()) is not None:
                place, piece = next_piece
                if asked.stream:
                    form.note_usage(place, piece)
                    await _stream(exchange, parts, form.events(place, piece))
                else:
                    await builders[place].add(piece)
            try:
                await generating
            except* Exception as group:
                raise group.exceptions[0] from None
            if asked.stream:
                await _stream(exchange, parts, form.last_events())
    except (ClientGone, ReadsTooSlowly):
        raise
    except Exception as error:
        if not exchange.answered:
            raise
        shown = await inside.generations.shown(error, Permissions())  # the request was valid
        await exchange.send_error(answer_of(shown, exchange.call.request_id))
        return
    finally:
        generating.cancel()
        await asyncio.wait({generating})
    if asked.stream:
        await exchange.write(b"data: [DONE]\n\n")
    else:
        await exchange.send_json(form.whole([builder.response for builder in builders]))


async def _stream(exchange: Exchange, parts: Outbox[Part], events: Iterable[dict[str, Any]]) -> None:
    for event in events:
        if not exchange.answered:
            await exchange.start(200, _STREAM_HEADERS)
        await parts.put(Part(b"data: " + json.dumps(event).encode() + b"\n\n"))


class _Form:
    """OpenAI's form of the answers to one request."""

    def __init__(self, asked: Asked, request: GenerationRequest, request_id: str):
        self._asked = asked
        self._n = request.sampling.n
        self._model = asked.name.text or names.name_of(request.adapter, request.task_set)
        self._fingerprint = names.fingerprint(request.adapter, request.task_set)
        self._id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        self._begun: set[int] = set()  # choices of a chat that have told their role
        self._offsets: dict[int, int] = {}  # choice → characters of its tokens so far
        self._usages: dict[int, pb.Usage] = {}  # of a stream: prompt → its usage

    def whole(self, responses: Sequence[pb.GenerateResponse]) -> dict[str, Any]:
        """The answers to all prompts as one object."""
        choices = []
        for place, response in enumerate(responses):
            for choice in response.choices:
                index = place * self._n + choice.index
                message = {"role": "assistant", "content": choice.text}
                text = {"message": message} if self._asked.is_chat else {"text": choice.text}
                choices.append(self._choice(index, choice) | text)
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        usage = _usage([response.usage for response in responses])
        return self._object(kind, choices) | {"system_fingerprint": self._fingerprint, "usage": usage}

    def note_usage(self, place: int, piece: pb.StreamGenerateResponse) -> None:
        """Keeps the usage of a prompt, which comes with its last piece."""
        if piece.HasField("usage"):
            self._usages[place] = piece.usage

    def events(self, place: int, piece: pb.StreamGenerateResponse) -> Iterable[dict[str, Any]]:
        """What a piece adds to the answers, one event for each choice."""
        for choice in piece.choices:
            index = place * self._n + choice.index
            event = self._choice(index, choice)
            if not self._asked.is_chat:
                event["text"] = choice.text
            elif index in self._begun:
                event["delta"] = {"content": choice.text}
            else:
                self._begun.add(index)
                event["delta"] = {"role": "assistant", "content": choice.text}
            whole = self._object(self._kind, [event])
            if choice.finish_reason:
                whole["system_fingerprint"] = self._fingerprint
            yield whole

    def last_events(self) -> Iterable[dict[str, Any]]:
        """What follows the answers."""
        if self._asked.include_usage:
            ending = {"system_fingerprint": self._fingerprint, "usage": _usage(self._usages.values())}
            yield self._object(self._kind, []) | ending

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._asked.is_chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(self, index: int, choice: pb.Choice) -> dict[str, Any]:
        finish = _FINISH.get(choice.finish_reason)
        stop = choice.stop_reason or None
        values: dict[str, Any] = {"index": index, "finish_reason": finish, "stop_reason": stop, "logprobs": None}
        if self._asked.requests[0].sampling.HasField("logprobs") and choice.logprobs:
            values["logprobs"] = self._logprobs(index, choice.logprobs)
        return values

    def _logprobs(self, index: int, positions: Sequence[pb.PositionLogprobs]) -> dict[str, Any]:
        if self._asked.is_chat:
            top = [[_entry(token) for token in position.top] for position in positions]
            return {
                "content": [
                    _entry(position.chosen) | {"top_logprobs": entries}
                    for position, entries in zip(positions, top, strict=True)
                ]
            }
        offsets = []
        for position in positions:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(position.chosen.text)
        named = list(_named(positions))
        return {
            "tokens": [chosen for chosen, _ in named],
            "token_logprobs": [_finite(position.chosen.logprob) for position in positions],
            "top_logprobs": [by_name for _, by_name in named],
            "text_offset": offsets,
        }


def _named(positions: Sequence[pb.PositionLogprobs]) -> Iterator[tuple[str, dict[str, float]]]:
    """At each position the chosen token's name, and name → log-probability of the most likely ones and the chosen one.

    Each has a name of its own: parts of characters have no text, and all but one would be lost in an object of JSON.
    """
    for position in positions:
        by_name: dict[str, float] = {}
        chosen = ""
        tokens = {token.token_id: token for token in (*position.top, position.chosen)}
        for token in tokens.values():
            name = token.text if token.text and token.text not in by_name else f"token_id:{token.token_id}"
            by_name[name] = _finite(token.logprob)
            if token.token_id == position.chosen.token_id:
                chosen = name
        yield chosen, by_name


def _entry(token: pb.TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _usage(usages: Iterable[pb.Usage]) -> dict[str, Any]:
    every = list(usages)
    prompt, completion = sum(u.prompt_tokens for u in every), sum(u.completion_tokens for u in every)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
