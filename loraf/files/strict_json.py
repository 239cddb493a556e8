"""Strict JSON: what is accepted has the same meaning to every reader. Standard library only.

Python's `json` accepts NaN, duplicate keys and unpaired surrogates, and a dataclass accepts values of any type. Other
readers understand these differently, so they are refused here. So is what no file of this project needs and what would
be expensive or fail later: deep nesting, millions of values, and (in `build`) integers beyond 128 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from loraf.limits import MAX_NAME

UNKNOWN_FIELD = "is not a known field"  # a message of `build`
DEEPEST = 64  # lists and objects within each other; code that walks a value recursively then ends well
MOST_VALUES = 1 << 22  # in one file; each takes about 100 bytes of memory, whatever it takes in the file
LONGEST_NAME = 100  # characters that messages show of a name that no checkpoint can have
_INTEGERS = 1 << 127  # from −2¹²⁷ to 2¹²⁷ − 1: far beyond any count, and sums stay cheap
T = TypeVar("T")


class Open:
    """Base of a dataclass whose JSON object may have other fields too, which `build` leaves out."""


def loads(data: bytes) -> Any:
    """Decodes a JSON value from UTF-8 without a byte order mark.

    Raises:
        ValueError: not JSON, or it holds NaN, an infinity, a number too large for a float or for Python's limit of
            digits, a duplicate key, a string that UTF-8 cannot encode, more than `MOST_VALUES` values, or lists and
            objects more than `DEEPEST` deep.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float
        )
        _require_shallow(value)
        dumps(value)  # fails for unpaired surrogates, which \\u escapes can spell
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def dumps(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """Encodes a value as UTF-8 JSON, without spaces if `indent` is None.

    Raises:
        ValueError, TypeError: the value has no JSON form (NaN, an unpaired surrogate, an object of another type).
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(
        value, indent=indent, sort_keys=sort_keys, separators=separators, ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def plain(value: Any) -> Any:
    """Returns `value` as it will be when it is read back: tuples become lists, keys become strings.

    Raises:
        ValueError, TypeError: the value has no JSON form.
    """
    return loads(dumps(value))


def build(cls: type[T], value: Any, where: str, report: Callable[[str, str], None]) -> T | None:
    """Builds an instance of dataclass `cls` from a JSON object. Fields with a default may be missing; no others.

    A field's type may be str, int, bool, float (which accepts integers too), Any, a dataclass, `X | None`,
    `tuple[X, ...]` or `dict[str, X]`.

    Args:
        where: name of the value in messages, such as `tasks[0]`. Empty for the whole file.
        report: called with (field, message) for every mistake.

    Returns:
        The instance, or None if a mistake was reported.
    """
    faults: list[tuple[str, str]] = []
    built = _convert(cls, value, where, faults)
    for fault in faults:
        report(*fault)
    return None if faults else built


def _convert(kind: Any, value: Any, where: str, faults: list[tuple[str, str]]) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _object(kind, value, where, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(arguments[0], value, where, faults)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", faults) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, _below(where, key), faults) for key, item in value.items()}
    if kind is Any or (kind is int and type(value) is int):
        faults += ((place, "is an integer beyond 128 bits") for place in _large_integers(value, where))
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            faults.append((where, "is a number too large for a float"))
            return None
    kinds = {
        str: "a string",
        int: "an integer",
        bool: "true or false",
        float: "a number",
        tuple: "a list",
        dict: "an object",
    }
    faults.append((where, f"is {shown(value)}, not {kinds[origin or kind]}"))
    return None


def _large_integers(value: Any, where: str) -> Iterator[str]:
    """Yields the place of every integer beyond 128 bits in a value. Sums and texts of such numbers have no bound."""
    if type(value) is int:
        if not -_INTEGERS <= value < _INTEGERS:
            yield where
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _large_integers(item, _below(where, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _large_integers(item, f"{where}[{i}]")


def _object(cls: type, value: Any, where: str, faults: list[tuple[str, str]]) -> Any:
    if not isinstance(value, dict):
        faults.append((where, f"is {shown(value)}, not an object"))
        return None
    before = len(faults)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not issubclass(cls, Open):
        faults += [(_below(where, key), UNKNOWN_FIELD) for key in value if key not in known]
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in value and required:
            faults.append((_below(where, name), "is missing"))
    hints = _type_hints(cls)
    fields = {name: _convert(hints[name], value[name], _below(where, name), faults) for name in known if name in value}
    return cls(**fields) if len(faults) == before else None


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _below(where: str, name: str) -> str:
    return f"{where}.{shown_name(name)}" if where else shown_name(name)


def shown(value: Any, longest: int = 40) -> str:
    """Returns a value from a file as messages show it: as Python writes it, cut to `longest` characters."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}…"


def shown_name(name: str) -> str:
    """Returns a name from a file as messages show it: without quotes, cut, and without characters that steer terminals.

    Names that a checkpoint may have are shown as they are.
    """
    if name.isprintable() and len(name) <= MAX_NAME:
        return name
    return shown(name[:MAX_NAME], LONGEST_NAME)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"duplicate key {shown(duplicate, LONGEST_NAME)}")
    return unique


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [item for held in containers for item in (held.values() if isinstance(held, dict) else held)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:LONGEST_NAME]} is too large for a float")
    return number
