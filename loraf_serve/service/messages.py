"""Converts outputs of backends, and adapters, to messages of the protocol."""

from __future__ import annotations

from collections.abc import Iterable

from loraf_serve.adapters.named_sets import NamedSet
from loraf_serve.backends.backend import (
    ChoiceDelta,
    GenerationRequest,
    Output,
    PositionLogprobs,
    ServedAdapter,
    TokenLogprob,
)
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORTED,
}


class ResponseStream:
    """Converts the Outputs of one request to messages.

    The first and the last message have `request_id` and `served_by`; the last has `usage`.
    """

    def __init__(self, request: GenerationRequest, request_id: str, backend: str):
        self._request = request
        self._request_id = request_id
        self._backend = backend
        self._first = True
        self._unfinished = set(range(request.sampling.n))
        self._cached = 0
        self._completion_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return not self._unfinished

    def message(self, output: Output) -> pb.StreamGenerateResponse | None:
        """The message for an output; None if there is nothing to send."""
        deltas = [d for d in output.choices if d.text or d.token_ids or d.finish_reason]
        self._cached = max(self._cached, output.cached_prompt_tokens)
        self._completion_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._unfinished -= {delta.index for delta in deltas if delta.finish_reason}
        if not deltas:
            return None
        message = pb.StreamGenerateResponse(choices=[_choice(delta) for delta in deltas])
        if output.prompt_logprobs:
            empty = pb.PositionLogprobs()
            message.prompt_logprobs.extend(_position(p) if p else empty for p in output.prompt_logprobs)
        if self._first or self.finished:
            message.request_id = self._request_id
            message.served_by.CopyFrom(served_by(self._request, self._backend))
        if self.finished:
            message.usage.prompt_tokens = len(self._request.prompt_token_ids)
            message.usage.cached_prompt_tokens = self._cached
            message.usage.completion_tokens = self._completion_tokens
        self._first = False
        return message


class ResponseBuilder:
    """Joins the messages of a stream into one response.

    Attributes:
        response: complete when the stream has ended.
    """

    def __init__(self) -> None:
        self.response = pb.GenerateResponse()
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    async def add(self, message: pb.StreamGenerateResponse) -> None:
        """Adds the next message."""
        self.response.prompt_logprobs.extend(message.prompt_logprobs)
        for piece in message.choices:
            choice = self._choices.setdefault(piece.index, pb.Choice(index=piece.index))
            self._texts.setdefault(piece.index, []).append(piece.text)
            choice.token_ids.extend(piece.token_ids)
            choice.logprobs.extend(piece.logprobs)
            if piece.finish_reason:
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        if not message.HasField("usage"):
            return
        for index in sorted(self._choices):
            self._choices[index].text = "".join(self._texts[index])
            self.response.choices.append(self._choices[index])
        self.response.request_id = message.request_id
        self.response.served_by.CopyFrom(message.served_by)
        self.response.usage.CopyFrom(message.usage)


def served_by(request: GenerationRequest, backend: str) -> pb.ServedBy:
    """The adapter's content, and the task set in canonical order."""
    adapter = request.adapter
    return pb.ServedBy(
        adapter=adapter.name if adapter else "",
        digest=adapter.digest if adapter else "",
        tasks=[pb.WeightedTask(name=name, weight=weight) for name, weight in request.task_set.weights],
        backend=backend,
    )


def adapter(served: ServedAdapter, resident_bytes: int, sets: Iterable[NamedSet] = ()) -> adapter_pb2.Adapter:
    """The description of a loaded adapter.

    Args:
        resident_bytes: memory that its content takes.
        sets: its named sets.
    """
    manifest = served.manifest
    return adapter_pb2.Adapter(
        name=served.name,
        digest=served.digest,
        base_model=served.shown_base,
        rank=manifest.rank,
        tasks=[
            adapter_pb2.Task(
                name=task.name,
                alpha=task.alpha,
                sparsity=task.sparsity,
                parameters=task.parameters,
                trained_with=task.trained_with,
            )
            for task in manifest.tasks
        ],
        resident_bytes=resident_bytes,
        sets=[_named_set(named) for named in sets],
    )


def _named_set(named: NamedSet) -> adapter_pb2.NamedSet:
    origin = adapter_pb2.SET_ORIGIN_OPERATOR if named.by_operator else adapter_pb2.SET_ORIGIN_CHECKPOINT
    tasks = [adapter_pb2.SetTask(name=name, weight=weight) for name, weight in named.task_set.weights]
    return adapter_pb2.NamedSet(name=named.name, tasks=tasks, origin=origin)


def _choice(delta: ChoiceDelta) -> pb.Choice:
    return pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH[delta.finish_reason],
        stop_reason=delta.stop_reason,
        logprobs=[_position(position) for position in delta.logprobs],
    )


def _position(position: PositionLogprobs) -> pb.PositionLogprobs:
    def entry(token: TokenLogprob) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank, text=token.text)

    return pb.PositionLogprobs(chosen=entry(position.chosen), top=[entry(token) for token in position.top])
