"""Values of records beyond those of JSON: integers that stand for a name, and values that cannot be read.

A value that cannot be read stays in its record: it is a mistake only where something uses it.
"""

from __future__ import annotations

from typing import Any, NoReturn


class Label(int):
    """A class label of a Hugging Face dataset: an integer whose text is the name of its class.

    Attributes:
        name: None where the integer names no class; −1 stands for a missing label.
    """

    name: str | None

    def __new__(cls, value: int, name: str | None) -> Label:
        label = super().__new__(cls, value)
        label.name = name
        return label

    def __getnewargs__(self) -> tuple[int, str | None]:  # type: ignore[override] # int's own has one value
        return int(self), self.name

    def __str__(self) -> str:
        return int.__repr__(self) if self.name is None else self.name


class Unreadable:
    """Stands for a value that cannot be read; a function of the user's own that looks at it gets a ValueError.

    Attributes:
        reason: completes the sentence «field … ».
        remedy: how to make it readable.
    """

    def __init__(self, reason: str, remedy: str):
        self.reason = reason
        self.remedy = remedy

    def __repr__(self) -> str:
        return f"Unreadable({self.reason!r})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(f"a field that it uses {self.reason}")

    __str__ = __bool__ = __eq__ = __lt__ = __gt__ = __len__ = __iter__ = __getitem__ = __int__ = __float__ = _refuse
    __hash__ = object.__hash__
