"""How a setting of tasks.yaml is declared: once, with its type, default, bounds, meaning, and what may be written.

    rank: Whole = setting(64, "Rank of every adapter.", expects="a whole number from 1, for example 64", ge=1)

`meaning` is one plain sentence for the documentation (`settings.reference`); `expects` completes «use …» in the message
about a wrong value (`settings.problems`).
"""

from __future__ import annotations

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


def _no_boolean(value: Any) -> Any:
    """Refuses YAML's true, yes and on, which Python would take for 1."""
    if isinstance(value, bool):
        raise mistake(f"{value!r} is not a number")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_boolean)]
