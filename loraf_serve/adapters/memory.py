"""Memory that adapters take: as people write it, and given back to the system."""

from __future__ import annotations

import ctypes

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(text: str) -> int:
    """`2GiB`, `1.5 GiB`, `300MiB` or a number of bytes.

    Raises:
        ValueError: it is none of these, or less than one byte.
    """
    number = text.strip()
    unit = next((unit for unit in reversed(_UNITS) if number.endswith(unit)), "B")
    size = float(number.removesuffix(unit)) * _UNITS[unit]
    if not 1 <= size < float("inf"):
        raise ValueError(f"{text!r} is no size")
    return int(size)


def size_text(size: int) -> str:
    """In the largest unit that makes it 1 or more, with up to four digits: `1.25 GiB`."""
    unit = next(unit for unit in reversed(_UNITS) if size >= _UNITS[unit] or unit == "B")
    return f"{size / _UNITS[unit]:.4g} {unit}"


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps what was freed in pieces. May take long; any thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl and macOS have none
    if trim is not None:
        trim(0)
