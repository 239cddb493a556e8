"""From pydantic's errors to problems: each with the field as the user wrote it, and a remedy."""

from __future__ import annotations

import copy
import difflib
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loraf.errors import Problem
from loraf_train.settings.yaml_file import OVERRIDE, Document, Location, location_text

Model = TypeVar("Model", bound=BaseModel)

_KINDS = {
    "int": "whole number",
    "float": "number",
    "string": "text",
    "bool": "true or false",
    "list": "list",
    "tuple": "list",
    "dict": "mapping",
    "model": "mapping",
    "path": "path",
}
_RANGES = ("greater_than", "less_than", "finite_number")


class Reader:
    """Validates parts of a document and gathers what is wrong with them.

    Args:
        document: as read from YAML.
        file: its path, for the messages.
        context: handed to the models' validators.
    """

    def __init__(self, document: Document, file: str, context: dict[str, Any]):
        self.content = document.content
        self.problems: list[Problem] = list(document.problems)
        self._overridden = document.overridden
        self._file = file
        self._context = context
        self._reported: list[Location] = []

    def validate(self, model: type[Model], where: Location) -> Model | None:
        """The part at `where` as a `model`. Wrong values are reported, left out and so replaced by their defaults.

        None: a value without a default is wrong or missing.
        """
        part = self.content
        for key in where:
            part = part[key]
        part = copy.deepcopy(part)
        while True:
            try:
                return model.model_validate(part, context=self._context)
            except ValidationError as error:
                found = error.errors(include_url=False)
            locations = [_written(part, e["loc"]) for e in found]
            for e, location in zip(found, locations, strict=True):
                message, remedy = _explain(model, e, location)
                self.add((*where, *location), message, remedy)
            # A missing key is mended by leaving out what lacks it.
            doomed = [at[:-1] if e["type"] == "missing" else at for e, at in zip(found, locations, strict=True)]
            if () in doomed:
                return None
            for location in sorted(doomed, key=_from_the_end, reverse=True):  # so that indices stay right
                _remove(part, location)

    def add(self, where: Location, message: str, remedy: str) -> None:
        """One problem, unless one was reported there, above or below: the rest follows from it."""
        where = _written(self.content, where)
        if any(where[: len(known)] == known or known[: len(where)] == where for known in self._reported):
            return
        self._reported.append(where)
        overridden = any(where[: len(path)] == path for path in self._overridden)
        file = OVERRIDE if overridden else self._file
        self.problems.append(Problem(message, location_text(where), file, remedy))

    def entries(self, key: str) -> list[Any]:
        """The list under a top key, as it was written; empty if there is none."""
        found = self.content.get(key)
        return found if isinstance(found, list) else []


def _written(part: Any, location: Location) -> Location:
    """The part of a location that the user wrote: short forms are expanded before they are validated."""
    written: list[str | int] = []
    for depth, key in enumerate(location):
        if isinstance(part, dict) and key in part or isinstance(part, list) and _is_index(key, part):
            part = part[key]
        elif isinstance(part, dict) and isinstance(key, int):
            continue  # one mapping where a list may stand
        elif isinstance(part, dict) and depth == len(location) - 1 and key != "[key]":
            return (*written, key)  # the key that is missing
        else:
            break
        written.append(key)
    return tuple(written)


def _is_index(key: str | int, entries: list[Any]) -> bool:
    return isinstance(key, int) and key < len(entries)


def _from_the_end(location: Location) -> list[str]:
    return [f"{key:09d}" if isinstance(key, int) else key for key in location]


def _remove(part: Any, location: Location) -> None:
    for key in location[:-1]:
        if not (isinstance(part, dict) and key in part or isinstance(part, list) and _is_index(key, part)):
            return  # it went with something above it
        part = part[key]
    last = location[-1]
    if isinstance(part, dict):
        part.pop(last, None)
    elif isinstance(part, list) and _is_index(last, part):
        del part[last]


def _explain(model: type[BaseModel], error: ErrorDetails, location: Location) -> tuple[str, str]:
    """Message and remedy."""
    kind, value = error["type"], error["input"]
    owner, description = _field_at(model, location)
    remedy = f"use {description}" if description else f"use a mapping with {', '.join(owner.model_fields)}"
    if kind == "loraf":
        return error["ctx"]["message"], error["ctx"]["remedy"] or remedy
    if kind == "extra_forbidden":
        return "is no known key", _nearest(str(location[-1]), owner)
    if kind == "missing":
        return "is missing", f"add it: {description}" if description else "add it"
    if kind == "literal_error":
        return f"{value!r} is not known", remedy
    if kind.startswith(_RANGES):
        return f"{value!r} is out of range", remedy
    if kind in ("too_short", "string_too_short"):
        return "is empty", remedy
    expected = _KINDS.get(kind.split("_")[0])
    if expected:
        article = "" if expected == "true or false" else "no "
        verb = "is neither" if expected == "true or false" else "is"
        text = f"{value!r} {verb} {article}{expected}".replace("neither true or", "neither true nor")
        quotes = expected == "text" and isinstance(value, bool | int | float)
        return text, "put it in quotes" if quotes else remedy
    return error["msg"], remedy


def _field_at(model: type[BaseModel], location: Location) -> tuple[type[BaseModel], str]:
    """The model that holds the last key of a location, and that key's description."""
    owner, description = model, ""
    inner: type[BaseModel] | None = model
    for key in location:
        if inner is None:
            continue
        if isinstance(key, str) and key in inner.model_fields:
            owner, description = inner, inner.model_fields[key].description or ""
            inner = _model_in(inner.model_fields[key].annotation)
        elif isinstance(key, str):
            owner = inner
    return owner, description


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `tuple[Source, ...]`, `dict[str, Source]`, `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        found = _model_in(part)
        if found:
            return found
    return None


def _nearest(key: str, owner: type[BaseModel]) -> str:
    close = difflib.get_close_matches(key, owner.model_fields, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    for name, info in owner.model_fields.items():
        inner = _model_in(info.annotation)
        if inner and key in inner.model_fields:
            return f"write it under {name}:"
    return f"choose from: {', '.join(owner.model_fields)}"
