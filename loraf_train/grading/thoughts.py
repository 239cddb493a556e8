"""Separates the thoughts of a reasoning model from its answer, as clients see it."""

from __future__ import annotations

OPENS, CLOSES = "<think>", "</think>"  # of Qwen3, DeepSeek-R1, QwQ, GLM and most others


def opened_thoughts(prompt: str) -> str:
    """Returns the end of a prompt that opens the thoughts itself: the mark and the white space after it; else ""."""
    return prompt[len(prompt.rstrip()) - len(OPENS) :] if prompt.rstrip().endswith(OPENS) else ""


def has_thoughts_twice(prompt: str, answer: str) -> bool:
    """Whether an answer opens thoughts right after others have ended, in the answer or in the prompt."""
    first, closes, rest = answer.partition(CLOSES)
    again = bool(closes) and rest.lstrip().startswith(OPENS)
    return again or prompt.rstrip().endswith(CLOSES) and first.lstrip().startswith(OPENS)


def after_thoughts(text: str, opened: bool = False) -> str:
    """Returns what follows the thoughts in an answer: all of it if there are none.

    Thoughts that do not end, because the answer was cut, are followed by nothing.

    Args:
        opened: whether the prompt has opened the thoughts.
    """
    _, closes, after = text.rpartition(CLOSES)
    if closes:
        return after.lstrip("\n")
    return "" if opened else text.partition(OPENS)[0]
