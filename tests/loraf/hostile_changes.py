"""Hostile values, and changes at random places of JSON, of its text, and of a safetensors header.

Decisions come from a `random.Random`, or from bytes.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Choices:
    """Decisions that are read from bytes, with the names of `random.Random`. At their end, each answer is the first."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """Returns a number from 0 to below − 1; 0 if there is none."""
        return int.from_bytes(self.take(1 if below <= 256 else 4), "little") % max(1, below)

    def randint(self, first: int, last: int) -> int:
        return first + self.number(last - first + 1)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.number(len(items))]

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]


Chance = random.Random | Choices


def nested(depth: int, pair: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if pair else [value]
    return value


NUMBERS = [0, -1, 1, 2, 4096, 4097, 65_535, 65_536, 2**24, 2**30, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 2**200]
NUMBERS += [-(2**63), 10**400, 0.5, -0.5, 1e-320, 1e20, 1e38, 1e39, 1e308, -1e308]
TEXTS = [
    "",
    "a",
    "\0",
    "é",
    "\n",
    "\x1b[31m",
    "../x",
    "/etc/passwd",
    "a" * 5000,
    "٣",
    "\u202e",
    "{x:>9999999999}",
    "tiny",
]
TEXTS += [
    "org/model",
    "NaN",
    "1e5",
    "math+nlu",
    "math",
    "base",
    "(a+)+$",
    "((((.*)*)*)*)*x",
    "(x+x+)+y",
    "[",
    "a{99999999999}",
]
OTHERS = [[], {}, [[]], ["math"], {"x": 1}, [1, "a", None], ["math"] * 5000, {"from": []}, None, True, False]


def a_value(chance: Chance) -> Any:
    kinds = (NUMBERS, TEXTS, OTHERS, [nested(depth, pair) for depth in (1, 2, 60, 70) for pair in (True, False)])
    return copy.copy(chance.choice(chance.choice(kinds)))


def place(chance: Chance, content: Any) -> tuple[Any, Any]:
    """Returns (container, key) of a value. Goes down step by step, so that long lists do not hide the rest."""
    container, key = [content], 0
    while True:
        value = container[key]
        keys = sorted(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if not keys or (value is not content and chance.randint(0, 4) == 0):
            return container, key
        container, key = value, chance.choice(keys)


def change(chance: Chance, content: Any) -> None:
    """Changes one place: another value, none, a copy of another place's, or an additional entry."""
    container, key = place(chance, content)
    if container == [content]:
        return
    kind = chance.choice(["value", "value", "value", "delete", "copy", "add"])
    if kind == "delete":
        del container[key]
    elif kind == "copy":
        other, of = place(chance, content)
        container[key] = json.loads(json.dumps(other[of]))
    elif kind == "add" and isinstance(container, dict):
        container[chance.choice(TEXTS)] = a_value(chance)
    else:
        container[key] = a_value(chance)


def text_change(chance: Chance, data: bytes) -> bytes:
    """Changes the text itself, so that digests may no longer fit."""
    at = chance.randint(0, len(data) - 1)
    piece = chance.choice([b"NaN", b"Infinity", b'"a":1,"a":1', b"[" * 100_000, b"1" * 5000, b"\\ud800", b"\xff", b""])
    return data[:at] + piece + data[at + chance.randint(0, 3) :]


def header_change(chance: Chance, data: bytes) -> bytes:
    """Changes the header of a safetensors file, or its length."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(chance.randint(1, 2)):
        change(chance, header)
    shape = chance.choice([None, None, [2**62, 2**62, 0], [0, 2**31], [1] * 70, [-1, -1]])
    if shape is not None and header:
        name = sorted(header)[0]
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": chance.choice([[0, 0], [0, 4], [0, 2**62]]),
        }
    text = json.dumps(header).encode()
    length = chance.choice([len(text)] * 5 + [0, 1, 2**31, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + text + data[end:]
