"""The text of a field's value, or the reason why it has none.

    text          as it is; bytes as UTF-8
    numbers       as Python writes them, without NaN and the infinities; a decimal without exponent
    class labels  the name
    booleans      true, false
    lists, maps   JSON; inside them null is allowed, and the rest follows the same rules
    dates, times, durations, UUIDs   as Python writes them

Everything else is a mistake of the record, as are null and a lone surrogate, which no text in UTF-8 can hold.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

from loraf_train.data.forms.form import RecordFault
from loraf_train.data.values import Label, Unreadable

_FILL = "fill the field or leave the record out"
_PLAIN = (datetime.date, datetime.time, datetime.timedelta, UUID)  # datetimes are dates


def field_text(value: Any, field: str) -> str:
    """Returns the text of a field's value.

    Args:
        field: its name, for messages.

    Raises:
        RecordFault: the value has no text.
    """
    return text_of(readable(value, field))


def text_or_none(value: Any) -> str | None:
    """Returns the text of a value; None if it has none."""
    try:
        return field_text(value, "")
    except RecordFault:
        return None


def readable(value: Any, field: str) -> Any:
    """Returns a value that `text_of` accepts: bytes are decoded, the contents of lists and mappings too.

    Raises:
        RecordFault: the value has no text.
    """
    if value is None:
        raise RecordFault(f"has null in field {field!r}", _FILL)
    if isinstance(value, Unreadable):
        raise RecordFault(f"field {field!r} {value.reason}", value.remedy)
    if isinstance(value, Label):
        if value.name is None:
            raise RecordFault(f"has label {int(value)} in field {field!r}, which stands for no class", _FILL)
        return value
    if isinstance(value, str):
        require_encodable(value, f"field {field!r}")
        return value
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise RecordFault(f"has {str(value).replace('nan', 'NaN')} in field {field!r}, which is not a text", _FILL)
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            remedy = "store text there, or leave the field out of the templates"
            raise RecordFault(f"has bytes in field {field!r} that are not UTF-8 text", remedy) from None
    if isinstance(value, Mapping):
        return {_key(key, field): _inner(item, f"{field}[{key}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_inner(item, f"{field}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (int, *_PLAIN)):
        return value
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return readable(value.tolist(), field)
    raise RecordFault(f"has a value of type {type(value).__name__} in field {field!r}", "store text or a number there")


def text_of(value: Any) -> str:
    """Returns the text of a value that `readable` returned."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=text_of)
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def require_encodable(text: str, what: str) -> None:
    """Raises RecordFault if a text has a lone surrogate, as half of an emoji's \\u escapes gives."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        remedy = r"write the character itself, or both halves of its escape, such as \ud83d\ude00"
        raise RecordFault(f"{what} has a lone surrogate ({half}), which is not a character", remedy) from None


def require_readable(value: Any, field: str) -> None:
    """Raises RecordFault if a value, or one inside it, is unreadable."""
    if isinstance(value, Unreadable):
        readable(value, field)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            require_readable(item, f"{field}[{key}]")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            require_readable(item, f"{field}[{i}]")


def _inner(value: Any, field: str) -> Any:
    """`readable` for a value in a list or mapping, in a type that JSON can write."""
    value = None if value is None else readable(value, field)
    return text_of(value) if isinstance(value, Label) else value


def _key(key: Any, field: str) -> str:
    return key if isinstance(key, str) else field_text(key, field)
