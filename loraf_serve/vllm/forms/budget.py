"""Limits the time that a form of an answer takes in vLLM's engine core, where every request waits for it."""

from __future__ import annotations

import time
from typing import Any

START_SECONDS = 0.25  # of processor time for an answer
TOKEN_SECONDS = 0.005  # more for each of its tokens


def install() -> None:
    """Ends an answer whose form takes more time than it may: vLLM then ends this request alone, as failed."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    fill, accept = XgrammarGrammar.fill_bitmask, XgrammarGrammar.accept_tokens

    def fill_bitmask(self: Any, bitmask: Any, idx: int) -> None:
        began = time.thread_time()
        fill(self, bitmask, idx)
        _spend(self, began)

    def accept_tokens(self: Any, request_id: str, tokens: list[int]) -> bool:
        began = time.thread_time()
        accepted = accept(self, request_id, tokens)
        self.loraf_tokens = getattr(self, "loraf_tokens", 0) + len(tokens)
        spent = _spend(self, began)
        return accepted and spent <= START_SECONDS + TOKEN_SECONDS * self.loraf_tokens

    XgrammarGrammar.fill_bitmask = fill_bitmask  # type: ignore[method-assign]  # vLLM has no setting for it
    XgrammarGrammar.accept_tokens = accept_tokens  # type: ignore[method-assign]  # as above


def _spend(grammar: Any, began: float) -> float:
    grammar.loraf_seconds = getattr(grammar, "loraf_seconds", 0.0) + time.thread_time() - began
    spent: float = grammar.loraf_seconds
    return spent
