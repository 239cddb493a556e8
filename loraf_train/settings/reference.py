"""All settings of tasks.yaml in the file's order, for the documentation."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loraf_train.settings.config import RunFile, TaskEntry
from loraf_train.settings.declare import expects
from loraf_train.settings.problems import model_in

REQUIRED = "required"
_VALIDATED_ALONE: dict[str, type[BaseModel]] = {"tasks": TaskEntry}  # RunFile leaves these to a model of their own
_DESCRIBED_ELSEWHERE = {"retention.base"}  # a source of records, as data.train
_SCALARS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


class SettingDescription(NamedTuple):
    """One setting.

    Attributes:
        key: dotted path: `training.epochs`, `tasks[].data.eval.<name>.choices`.
        type: such as «whole number», «list of text» or «mapping».
        default: as YAML would write it; "null" if leaving it out has a meaning of its own, which `meaning` says;
            "required"; empty for a mapping of further settings.
        meaning: one sentence.
        expects: what may be written.
    """

    key: str
    type: str
    default: str
    meaning: str
    expects: str


def describe_settings() -> Iterator[SettingDescription]:
    """Yields every setting, each group's single values before its sections.

    The settings inside a section that occurs in several places, such as `training:`, are yielded where it occurs first.
    """
    yield from _describe(RunFile, "", set())


def _describe(model: type[BaseModel], prefix: str, described: set[type[BaseModel]]) -> Iterator[SettingDescription]:
    described.add(model)
    fields = [(name, field, _section(prefix + name, field)) for name, field in model.model_fields.items()]
    for name, field, section in sorted(fields, key=_sort_key):
        key = prefix + name
        kind = f"list of {_type_text(section)}" if key in _VALIDATED_ALONE else _type_text(field.annotation)
        yield SettingDescription(key, kind, _default_text(field, section), field.description or "", expects(field))
        if section is not None and section not in described and key not in _DESCRIBED_ELSEWHERE:
            yield from _describe(section, f"{key}{_entry_text(kind)}.", described)


def _sort_key(entry: tuple[str, FieldInfo, type[BaseModel] | None]) -> tuple[bool, bool]:
    """Required values first, then optional ones, then sections; otherwise as declared."""
    _, field, section = entry
    return section is not None, section is None and not field.is_required()


def _section(key: str, field: FieldInfo) -> type[BaseModel] | None:
    return _VALIDATED_ALONE.get(key) or model_in(field.annotation)


def _entry_text(kind: str) -> str:
    """How a key continues to an entry of the setting."""
    return "[]" if kind.startswith("list") else ".<name>" if kind.startswith("mapping of names") else ""


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments if argument is not types.NoneType)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _SCALARS[annotation]


def _default_text(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=False)
    return "" if section is not None and default is not None else _yaml_text(default)


def _yaml_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
