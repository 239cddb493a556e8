"""What is known of one call of a client, and the interface of those who observe calls.

service ── began, answering, tokens, ended ──▶ Observer (metrics, logs, traces)
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass
class Call:
    """One call of a client, filled in while it proceeds. Holds no adapter: it may outlive one that is unloaded.

    Attributes:
        method: gRPC's full name, such as /loraf.v1.GenerationService/Generate; or method and route of HTTP, such as
            POST /v1/completions.
        metadata: the client's metadata that is text, or headers, with names in lower case.
        request_id: the client's if its request has a usable one, else random. Every error and log line has it.
        client: name of the client's token; "" if the server has no tokens.
        began, answering, first_token, last_token, ended: times of `time.perf_counter`, in seconds; None if not reached.
            `answering` is when the validated request went to the backend.
        adapter, task_set: what answers, once the request is validated; the set as text, "base" for the base model.
        prompt_tokens, cached_prompt_tokens, completion_tokens: counts so far.
        code: name of the gRPC status that ended the call; "" before.
        trace_id, span_id: of the call's OpenTelemetry span, in hexadecimal; "" if there is none.
        prompt, answer: texts, only if the operator asked to log them; else "".
    """

    method: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    client: str = ""
    began: float = field(default_factory=time.perf_counter)
    answering: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    adapter: str = ""
    task_set: str = ""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    code: str = ""
    trace_id: str = ""
    span_id: str = ""
    prompt: str = ""
    answer: str = ""

    @property
    def name(self) -> str:
        """The method without its service; the route of HTTP. Only methods that exist are observed, so there are few."""
        return self.method.partition(" ")[2] if self.is_http else self.method.rpartition("/")[2]

    @property
    def is_http(self) -> bool:
        """Whether the call came over HTTP, not gRPC."""
        return " /" in self.method


class Observer:
    """Is told of every call, on the server's loop; must not block. Every method may be left as it is: a no-op."""

    def began(self, call: Call) -> None:
        """A call has arrived; its request has not been read."""

    def answering(self, call: Call) -> None:
        """The request is valid and goes to the backend."""

    def tokens(self, call: Call, count: int, since: float | None) -> None:
        """`count` more tokens are ready, at `call.last_token`.

        Args:
            since: time of the tokens before them; None for the first.
        """

    def ended(self, call: Call) -> None:
        """The call has its status."""


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the running task answers."""


def current() -> Call:
    """The call that the running task answers. Only within a call: the gate sets it."""
    call = CURRENT.get()
    assert call is not None
    return call


def inform(observers: Iterable[Observer], event: str, *arguments: object) -> None:
    """Calls a method of every observer. A failing observer is logged and does not harm the call."""
    for observer in observers:
        try:
            getattr(observer, event)(*arguments)
        except Exception:
            log.exception("%s failed at %s", type(observer).__name__, event)
