"""Which JSON schemas XGrammar keeps to. It ignores keywords that it does not know."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loraf.errors import one_line

# What XGrammar obeys. It takes `oneOf` as `anyOf`. It counts a name that is there twice as two for `minProperties`.
_OBEYED = frozenset(
    (
        *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "enum", "const"),
        *("anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "format", "pattern", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
        *("maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems"),
    )
)
# What says nothing about values.
_NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "deprecated"),
        *("readOnly", "writeOnly", "discriminator"),
    )
)
# What is obeyed only where nothing else is said, but a type beside values of this type.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_VALUES = ("enum", "const")
# What is obeyed only beside one of these types.
_NEED_TYPE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"): ("number", "integer"),
    ("minLength", "maxLength", "pattern", "format"): ("string",),
    ("required", "maxProperties", "propertyNames", "patternProperties"): ("object",),
    ("minItems", "maxItems"): ("array",),
}
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "items", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")


def problem_with(schema: object) -> str:
    """Returns what is wrong with a schema, or what XGrammar would not keep to; "" if it keeps to everything."""
    if not isinstance(schema, dict):
        return "is not a JSON object"
    try:
        return _problem_with(schema)
    except Exception as error:  # vLLM's code may stumble over what no schema has
        return f"is not a JSON schema that can be checked ({one_line(error)})"


def _problem_with(schema: dict[str, Any]) -> str:
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    for part in _schemas(schema):
        problem = _misshaped(part) or _problem_here(part)
        if problem:
            return problem
    if has_xgrammar_unsupported_json_features(schema):
        return "has a combination of keywords that XGrammar does not obey"
    return ""


def _misshaped(part: dict[str, Any]) -> str:
    """Which keyword of one schema has a value that it cannot have."""
    for names, holds, wanted in _SHAPES:
        for name in names:
            if name in part and not holds(part[name]):
                return f"is not a JSON schema: {name} must be {wanted}"
    return ""


def _is_type(value: object) -> bool:
    types = value if isinstance(value, list) else [value]
    return bool(types) and _are_names(types) and set(types) <= set(_TYPES)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_schema(value: object) -> bool:
    return isinstance(value, dict | bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# Keywords, whether a value is one that they can have, and in words.
_SHAPES: tuple[tuple[Iterable[str], Callable[[Any], bool], str], ...] = (
    (("type",), _is_type, f"one or a list of {', '.join(_TYPES)}"),
    (_SCHEMAS, _is_schema, "a schema"),
    (_SCHEMAS_BY_NAME, lambda v: isinstance(v, dict) and all(map(_is_schema, v.values())), "schemas by name"),
    (_LISTS_OF_SCHEMAS, lambda v: isinstance(v, list) and bool(v) and all(map(_is_schema, v)), "a list of schemas"),
    (("enum",), lambda v: isinstance(v, list) and bool(v), "a list of values"),
    (("required",), _are_names, "a list of distinct names"),
    (("$ref", "format", "pattern"), _is_text, "a text"),
    (("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number, "a number that a float can hold"),
    (
        ("minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
        "an integer from 0",
    ),
)


def _problem_here(part: dict[str, Any]) -> str:
    """The same for one schema without those in it."""
    said = part.keys() - _NOTES
    ignored = said - _OBEYED
    if ignored:
        return f"XGrammar does not obey {_names(ignored)}"
    for name in _ALONE:
        beside = said - {name, "$defs", "definitions"} - ({"type"} if name in _VALUES else set())
        if name in part and beside:
            return f"XGrammar does not obey what stands beside {name}: {_names(beside)}"
    types = part.get("type")
    types = set(types if isinstance(types, list) else [types])
    for names, of_type in _NEED_TYPE.items():
        untyped = said & set(names)
        if untyped and not types & set(of_type):
            return f"XGrammar obeys {_names(untyped)} only beside the type {of_type[0]!r}"
    required, properties = part.get("required"), part.get("properties")
    if required:
        unknown = set(required) - set(properties or ())
        if unknown:
            return f"XGrammar does not obey required for what properties does not name: {_names(unknown)}"
    if "type" in part and ("enum" in part or "const" in part):
        values = part.get("enum", [part.get("const")])
        if not all(_is_of(value, types) for value in values):
            return "XGrammar does not obey type beside enum and const: a value is of another type"
    return ""


def _is_of(value: object, types: set[object]) -> bool:
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in types
    kinds: dict[type, set[object]] = {str: {"string"}, dict: {"object"}, list: {"array"}, float: {"number"}}
    return bool(types & kinds.get(type(value), {"integer", "number"}))


def _names(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(repr, names)))[:150]


def _schemas(schema: object) -> Iterator[dict[str, Any]]:
    """The schema and every schema in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in _SCHEMAS_BY_NAME:
        if isinstance(schema.get(name), dict):
            for part in schema[name].values():
                yield from _schemas(part)
    for name in _LISTS_OF_SCHEMAS:
        if isinstance(schema.get(name), list):
            for part in schema[name]:
                yield from _schemas(part)
    for name in _SCHEMAS:
        yield from _schemas(schema.get(name))
