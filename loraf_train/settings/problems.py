"""From pydantic's errors to problems: each names the field as the user wrote it, and a remedy."""

from __future__ import annotations

import copy
import difflib
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loraf.errors import Problem
from loraf_train.settings.declare import SettingsModel, expects
from loraf_train.settings.yaml_file import OVERRIDE, Document, Location, location_text

Settings = TypeVar("Settings", bound=SettingsModel)

_BOOLEAN = "true or false"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": _BOOLEAN,
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "path": "a path",
}
_RANGES = ("greater_than", "less_than", "finite_number")


class SettingsReader:
    """Validates parts of a document and collects their problems.

    Args:
        document: as read from YAML.
        file: its path, for the messages.
        context: passed to the models' validators.
    """

    def __init__(self, document: Document, file: str, context: dict[str, Any]):
        self.content = document.content or {}
        self.problems: list[Problem] = list(document.problems)
        self._overridden = document.overridden
        self._file = file
        self._context = context
        self._reported: list[Location] = []

    def validate(self, model: type[Settings], where: Location) -> Settings | None:
        """Returns the part at `where` as a `model`. Wrong values are reported and replaced by their defaults.

        None: a value without a default is wrong or missing.
        """
        part: Any = self.content
        for key in where:
            part = part[key]
        part = copy.deepcopy(part)
        while True:
            try:
                return model.model_validate(part, context=self._context)
            except ValidationError as error:
                errors = error.errors(include_url=False)
            locations = [_written(part, e["loc"]) for e in errors]
            for e, location in zip(errors, locations, strict=True):
                message, remedy = _explain(model, e, location)
                self.add((*where, *location), message, remedy)
            # Where a key is missing, the mapping that lacks it is left out.
            invalid = [at[:-1] if e["type"] == "missing" else at for e, at in zip(errors, locations, strict=True)]
            if () in invalid:
                return None
            for location in sorted(invalid, key=_sort_key, reverse=True):  # from the end, so that indices stay valid
                _remove(part, location)

    def add(self, where: Location, message: str, remedy: str) -> None:
        """Adds a problem, unless one was already reported there, above or below: it would only be a consequence."""
        where = _written(self.content, where)
        if any(where[: len(other)] == other or other[: len(where)] == where for other in self._reported):
            return
        self._reported.append(where)
        overridden = any(where[: len(path)] == path for path in self._overridden)
        file = OVERRIDE if overridden else self._file
        self.problems.append(Problem(message, location_text(where), file, remedy))

    def entries(self, key: str) -> list[Any]:
        """Returns the list under a top key, as it was written; empty if there is none."""
        value = self.content.get(key)
        return value if isinstance(value, list) else []


def _written(part: Any, location: Location) -> Location:
    """Returns the part of a location that the user wrote: short forms are expanded before validation."""
    written: list[str | int] = []
    for depth, key in enumerate(location):
        if _has(part, key):
            part = part[key]
        elif isinstance(part, dict) and isinstance(key, int):
            continue  # a single mapping in place of a list
        elif isinstance(part, dict) and depth == len(location) - 1 and key != "[key]":
            return (*written, key)  # the key that is missing
        else:
            break
        written.append(key)
    return tuple(written)


def _has(part: Any, key: str | int) -> bool:
    if isinstance(part, list):
        return isinstance(key, int) and key < len(part)
    return isinstance(part, dict) and key in part


def _sort_key(location: Location) -> list[str]:
    """Sorts indices as numbers."""
    return [f"{key:09d}" if isinstance(key, int) else key for key in location]


def _remove(part: Any, location: Location) -> None:
    for key in location[:-1]:
        if not _has(part, key):
            return  # removed with something above it
        part = part[key]
    if _has(part, location[-1]):
        del part[location[-1]]


def _explain(model: type[BaseModel], error: ErrorDetails, location: Location) -> tuple[str, str]:
    """Returns message and remedy."""
    kind, value = error["type"], error["input"]
    owner, expected = _field_at(model, location)
    remedy = f"use {expected}" if expected else f"use a mapping with {', '.join(owner.model_fields)}"
    if kind == "loraf":
        return error["ctx"]["message"], error["ctx"]["remedy"] or remedy
    if kind == "extra_forbidden":
        return "is not a known key", _nearest(str(location[-1]), owner)
    if kind == "missing":
        return "is missing", f"add it: {expected}" if expected else "add it"
    if kind == "literal_error":
        return f"{value!r} is not known", remedy
    if kind.startswith(_RANGES):
        return f"{value!r} is out of range", remedy
    if kind in ("too_short", "string_too_short"):
        return "is empty", remedy
    name = _KINDS.get(kind.split("_")[0])
    if name == _BOOLEAN:
        return f"{value!r} is neither true nor false", remedy
    if name:
        unquoted = name == "text" and isinstance(value, bool | int | float)
        return f"{value!r} is not {name}", "put it in quotes" if unquoted else remedy
    return error["msg"], remedy


def _field_at(model: type[BaseModel], location: Location) -> tuple[type[BaseModel], str]:
    """Returns the model that holds the last key of a location, and what is expected there."""
    owner, expected = model, ""
    inner: type[BaseModel] | None = model
    for key in location:
        if inner is None:
            continue
        if isinstance(key, str) and key in inner.model_fields:
            owner, expected = inner, expects(inner.model_fields[key])
            inner = model_in(inner.model_fields[key].annotation)
        elif isinstance(key, str):
            owner = inner
    return owner, expected


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model inside `tuple[M, ...]`, `dict[str, M]`, `M | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        model = model_in(part)
        if model:
            return model
    return None


def _nearest(key: str, owner: type[BaseModel]) -> str:
    close = difflib.get_close_matches(key, owner.model_fields, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    for name, info in owner.model_fields.items():
        inner = model_in(info.annotation)
        if inner and key in inner.model_fields:
            return f"write it under {name}:"
    return f"choose from: {', '.join(owner.model_fields)}"
