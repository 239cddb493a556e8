"""Reads JSON that a client sends inside a text field."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from loraf_serve import limits


class NotJsonError(ValueError):
    """The text is not a JSON object that may be used; the message says why."""


def read_object(text: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        NotJsonError: not JSON (NaN and infinity are not), a number too large, not an object, a name twice, or too deep.
    """
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError:
        raise NotJsonError(f"has more than {limits.MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise NotJsonError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise NotJsonError("is not a JSON object")
    level: list[Any] = [value]
    for _ in range(limits.MAX_JSON_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, dict | list)]
        if not level:
            return value
    raise NotJsonError(f"has more than {limits.MAX_JSON_DEPTH} levels")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a value of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name is there twice")
    return members
