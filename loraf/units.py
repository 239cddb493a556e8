"""Sizes in bytes as people write and read them."""

from __future__ import annotations

_DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SPELLINGS = {"KB": 10**3}
_READ = {**_BINARY, **_DECIMAL, **_SPELLINGS}


def size_text(size: float) -> str:
    """A number of bytes in the largest decimal unit that makes it 1 or more, with up to four digits: `1.25 GB`."""
    unit = next(unit for unit in reversed(_DECIMAL) if size >= _DECIMAL[unit] or unit == "B")
    return f"{size / _DECIMAL[unit]:.4g} {unit}"


def parse_size(text: str) -> int:
    """The bytes that `2GB`, `1.5 GiB`, `300MB` or a plain number of bytes stands for.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    number = text.strip()
    unit = max((unit for unit in _READ if number.endswith(unit)), key=len, default="")
    size = float(number.removesuffix(unit)) * _READ.get(unit, 1)
    if not 1 <= size < float("inf"):
        raise ValueError(f"{text!r} is not a size")
    return int(size)
