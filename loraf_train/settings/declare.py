"""How a setting of tasks.yaml is declared: once, with its type, default, bounds, meaning, and what may be written.

    rank: Whole = setting(64, "Rank of every adapter.", expects="a whole number from 1, for example 64", ge=1)

`meaning` is one plain sentence for the documentation (`settings.reference`); `expects` completes «use …» in the message
about a wrong value (`settings.problems`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class SettingsModel(BaseModel):
    """Base of all parts of a tasks.yaml: immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


def setting(default: Any, meaning: str, *, expects: str, **bounds: Any) -> Any:
    """Declares one setting of a `SettingsModel`.

    Args:
        default: `...` if the file must give a value.
        bounds: `gt`, `ge`, `lt`, `le`, `min_length`, as for `pydantic.Field`.
    """
    return Field(default, description=meaning, json_schema_extra={"expects": expects}, **bounds)


def expects(field: FieldInfo) -> str:
    """What may be written for a field that `setting` declares; empty for any other."""
    extra = field.json_schema_extra
    return str(extra["expects"]) if isinstance(extra, dict) and "expects" in extra else ""


def mistake(message: str, remedy: str = "") -> PydanticCustomError:
    """What validators raise. Without a remedy, the message names what the setting expects."""
    return PydanticCustomError("loraf", "{message}", {"message": message, "remedy": remedy})


MOST = 10**9  # of anything that is counted: products of two still fit where Python and torch count
_SCIENTIFIC = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")  # YAML 1.1 reads 1e-4 as text: its floats have a point


def _only_numbers(value: Any) -> Any:
    """Refuses what Python would take for a number: YAML's true, yes and on, and text in quotes."""
    if isinstance(value, bool):
        raise mistake(f"{value!r} is not a number")
    if isinstance(value, str) and not _SCIENTIFIC.fullmatch(value) and _is_number(value):
        raise mistake(f"{value!r} is text, not a number", "write it without quotes, and without leading zeros")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


Number = Annotated[float, BeforeValidator(_only_numbers), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_only_numbers), Field(le=MOST)]
Seed = Annotated[int, BeforeValidator(_only_numbers), Field(ge=0, lt=1 << 32)]
Switch = Annotated[bool, Field(strict=True)]  # true or false: no text, which would be true for "yes", and no number
