"""What the clients return, and how a notebook shows it. Every text of the server is escaped in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from loraf.units import size_text
from loraf_serve.v1 import adapter_pb2, generation_pb2, info_pb2

_SHOWN = 70  # characters of an answer in its repr


@dataclass(frozen=True)
class Piece:
    """A new piece of one answer. `str(piece)` is its text.

    Attributes:
        index: which of the `n` answers, from 0.
        finish_reason: "" until the last piece, then "stop", "length" or "aborted".
        response: the whole message: log-probabilities; usage in the last; served_by in the first and the last.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    response: generation_pb2.StreamGenerateResponse

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finish_reason else ""
        return f"Piece({self.text!r}, index={self.index}{end})"


@dataclass(frozen=True)
class Answer:
    """The first of the `n` answers. `str(answer)` is its text.

    Attributes:
        finish_reason: "stop", "length" or "aborted"; "" if its stream was closed before its end.
        response: the whole message: all answers, log-probabilities, usage, served_by, request_id.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    response: generation_pb2.GenerateResponse

    @property
    def request_id(self) -> str:
        """The id by which the server's log knows the request."""
        return self.response.request_id

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of all `n` answers."""
        return tuple(choice.text for choice in self.response.choices)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else self.text[: _SHOWN - 1] + "…"
        return f"Answer({text!r}, {self.summary()})"

    def _repr_html_(self) -> str:
        texts = "".join(
            f'<pre style="white-space: pre-wrap">{escape(choice.text)}</pre>' for choice in self.response.choices
        )
        return f"{texts}<small>{escape(self.summary())}</small>"

    def summary(self) -> str:
        """What answered: the task set, the adapter, the backend, numbers of tokens, why the answer ended."""
        served_by, usage = self.response.served_by, self.response.usage
        adapter = f"{served_by.adapter}@{served_by.digest[:12]}" if served_by.adapter else ""
        tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
        parts = (set_text(served_by.tasks), adapter, served_by.backend, tokens, self.finish_reason)
        return ", ".join(part for part in parts if part)


class AdapterList(list[adapter_pb2.Adapter]):
    """The loaded adapters: a list of messages, shown as a table."""

    _HEADER = ("adapter", "tasks", "named sets", "base model", "rank", "memory", "digest")

    def __repr__(self) -> str:
        described = (f"{name}: {tasks or 'no tasks'}" for name, tasks, *_ in self._rows())
        return f"[{'; '.join(described)}]"

    def _repr_html_(self) -> str:
        return _table(self._HEADER, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                adapter.name,
                ", ".join(task.name for task in adapter.tasks),
                ", ".join(f"{named.name} = {set_text(named.tasks)}" for named in adapter.sets),
                adapter.base_model,
                str(adapter.rank),
                size_text(adapter.resident_bytes),
                adapter.digest[:12],
            )
            for adapter in self
        ]


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and what it admits.

    Attributes:
        model: the base model.
        backend: "slots", "resident" or "merged".
        versions: of the server's packages, by name.
        unsupported_fields: fields of requests that the server refuses, such as "sampling.structured_output".
        limits: name of a limit to its value. Sizes are in bytes, times in seconds, prompts in tokens.
        response: the whole message: also what each limit means.
    """

    model: str
    backend: str
    versions: dict[str, str]
    unsupported_fields: tuple[str, ...]
    limits: dict[str, float]
    response: info_pb2.GetServerInfoResponse

    def __repr__(self) -> str:
        return f"ServerInfo({self.model!r}, backend={self.backend!r}, versions={self.versions})"

    def _repr_html_(self) -> str:
        return _table(("", ""), self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """Everything as (name, text), for tables."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        unsupported = ", ".join(self.unsupported_fields) or "none"
        limits = [
            (limit.name, f"{limit.value:.15g}" + (f" ({limit.description})" if limit.description else ""))
            for limit in self.response.limits
        ]
        return [
            ("model", self.model),
            ("backend", self.backend),
            ("versions", versions),
            ("unsupported fields", unsupported),
            *limits,
        ]


def answer_of(response: generation_pb2.GenerateResponse) -> Answer:
    """The answer in a response."""
    first = response.choices[0] if response.choices else generation_pb2.Choice()
    return Answer(first.text, tuple(first.token_ids), finish_reason(first), response)


def pieces_of(message: generation_pb2.StreamGenerateResponse) -> list[Piece]:
    """The pieces in one message of a stream."""
    return [
        Piece(choice.index, choice.text, tuple(choice.token_ids), finish_reason(choice), message)
        for choice in message.choices
    ]


def joined(messages: Sequence[generation_pb2.StreamGenerateResponse]) -> generation_pb2.GenerateResponse:
    """The messages of a stream as one response."""
    response = generation_pb2.GenerateResponse()
    if not messages:
        return response
    pieces = [choice for message in messages for choice in message.choices]
    for index in sorted({piece.index for piece in pieces}):
        own = [piece for piece in pieces if piece.index == index]
        response.choices.add(
            index=index,
            text="".join(piece.text for piece in own),
            token_ids=[token for piece in own for token in piece.token_ids],
            logprobs=[position for piece in own for position in piece.logprobs],
            finish_reason=own[-1].finish_reason,
            stop_reason=own[-1].stop_reason,
        )
    first, last = messages[0], messages[-1]
    response.request_id = first.request_id
    response.served_by.CopyFrom(first.served_by)
    response.prompt_logprobs.extend(first.prompt_logprobs)
    if last.HasField("usage"):
        response.usage.CopyFrom(last.usage)
    return response


def server_info_of(response: info_pb2.GetServerInfoResponse) -> ServerInfo:
    """The information in a response."""
    return ServerInfo(
        response.model,
        response.backend,
        dict(response.versions),
        tuple(response.unsupported_fields),
        {limit.name: limit.value for limit in response.limits},
        response,
    )


def finish_reason(choice: generation_pb2.Choice) -> str:
    """ "" while the answer goes on, then "stop", "length" or "aborted"."""
    if not choice.finish_reason:
        return ""
    return generation_pb2.FinishReason.Name(choice.finish_reason).removeprefix("FINISH_REASON_").lower()


def set_text(tasks: Iterable[generation_pb2.WeightedTask | adapter_pb2.SetTask]) -> str:
    """A task set as text, such as math+nlu:0.5, or base."""
    return "+".join(task.name if task.weight == 1 else f"{task.name}:{task.weight:g}" for task in tasks) or "base"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if any(header) else ""
    return f"<table>{head}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
