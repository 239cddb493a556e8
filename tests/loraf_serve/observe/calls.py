"""Calls made by hand, as the service would make them."""

from __future__ import annotations

from collections.abc import Sequence

from loraf_serve.observe.call import Call, Observer

GENERATE = "/loraf.v1.GenerationService/Generate"
LOAD = "/loraf.v1.AdapterService/LoadAdapter"


def begin(observers: Sequence[Observer], method: str = GENERATE, metadata: dict[str, str] | None = None) -> Call:
    """A call that has arrived at time 100."""
    call = Call(method, metadata or {}, request_id="r1", began=100.0)
    for observer in observers:
        observer.began(call)
    return call


def answer(
    observers: Sequence[Observer],
    adapter: str = "trio",
    task_set: str = "math",
    tokens: Sequence[tuple[float, int]] = ((100.5, 1), (100.7, 2)),
    code: str = "OK",
    call: Call | None = None,
) -> Call:
    """A whole generation call with 10 tokens in its prompt, 4 of them cached.

    Args:
        tokens: times, and numbers of tokens that are ready then.
    """
    call = call or begin(observers)
    call.answering, call.adapter, call.task_set, call.prompt_tokens = 100.1, adapter, task_set, 10
    for observer in observers:
        observer.answering(call)
    since = None
    for when, count in tokens:
        call.first_token, call.last_token = call.first_token or when, when
        call.cached_prompt_tokens = 4
        call.completion_tokens += count
        for observer in observers:
            observer.tokens(call, count, since)
        since = when
    return end(observers, call, code)


def end(observers: Sequence[Observer], call: Call, code: str) -> Call:
    call.code, call.ended = code, 101.0
    for observer in observers:
        observer.ended(call)
    return call
