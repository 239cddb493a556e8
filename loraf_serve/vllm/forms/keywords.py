"""Which JSON schemas XGrammar keeps to. It ignores keywords that it does not know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

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
# What is obeyed only where nothing else is said.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
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


def problem_with(schema: dict[str, Any]) -> str:
    """Returns what XGrammar would not keep to; "" if it keeps to everything."""
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    for part in _schemas(schema):
        problem = _problem_here(part)
        if problem:
            return problem
    if has_xgrammar_unsupported_json_features(schema):
        return "has a combination of keywords that XGrammar does not obey"
    return ""


def _problem_here(part: dict[str, Any]) -> str:
    """The same for one schema without those in it."""
    said = part.keys() - _NOTES
    ignored = said - _OBEYED
    if ignored:
        return f"XGrammar does not obey {_names(ignored)}"
    for name in _ALONE:
        beside = said - {name, "$defs", "definitions"}
        if name in part and beside:
            return f"XGrammar does not obey what stands beside {name}: {_names(beside)}"
    types = part.get("type")
    types = set(types if isinstance(types, list) else [types])
    for names, of_type in _NEED_TYPE.items():
        untyped = said & set(names)
        if untyped and not types & set(of_type):
            return f"XGrammar obeys {_names(untyped)} only beside the type {of_type[0]!r}"
    required, properties = part.get("required"), part.get("properties")
    if isinstance(required, list):
        unknown = [name for name in required if not (isinstance(properties, dict) and name in properties)]
        if unknown:
            return f"XGrammar does not obey required for what properties does not name: {_names(unknown)}"
    if "type" in part and ("enum" in part or "const" in part):
        values = part.get("enum", [part.get("const")])
        if isinstance(values, list) and not all(_is_of(value, types) for value in values):
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
