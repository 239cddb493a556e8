"""Reads a YAML file as plain data and applies `--set key=value`. Knows nothing about the meaning of the keys."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loraf.errors import Problem

Location = tuple[str | int, ...]
OVERRIDE = "--set"
_TAG = "tag:yaml.org,2002:"
_ONLY_IN_YAML_1_1 = re.compile(rf"{_TAG}(timestamp.*|int[-+]?0[0-7_]+|(int|float).*:.*)")


@dataclass
class Document:
    """A YAML file and its problems.

    Attributes:
        content: the top mapping; None if nothing is usable.
        problems: of the YAML itself and of the overrides.
        overridden: the locations that overrides replaced.
    """

    content: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    overridden: list[Location] = field(default_factory=list)


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Reads a file. Mistakes of the user become problems, never exceptions."""
    document = Document()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        document.problems.append(Problem("there is no such file", file=str(path), remedy="name a tasks.yaml"))
        return document
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        document.problems.append(Problem(f"cannot be read ({reason})", file=str(path), remedy="name a tasks.yaml"))
        return document
    content = _parse(text, str(path), document.problems)
    if document.problems and content is None:
        return document
    if not isinstance(content, dict):
        remedy = "begin with model:, output: and tasks:"
        document.problems.append(Problem("is not a mapping of keys to values", file=str(path), remedy=remedy))
        return document
    document.content = content
    for override in overrides:
        _apply(document, override)
    return document


class _Loader(yaml.SafeLoader):
    """The safe loader, which also records duplicate keys (YAML would silently take the last one).

    What YAML 1.1 alone reads as something else is text, as in YAML 1.2: dates, 010 (eight) and 1:30 (ninety).
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self.duplicates: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    self.duplicates.append((key_node.value, key_node.start_mark.line + 1))
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]  # of PyYAML
        if kind is yaml.ScalarNode and implicit[0] and _ONLY_IN_YAML_1_1.fullmatch(tag + value):
            return self.DEFAULT_SCALAR_TAG
        return tag


def _parse(text: str, file: str, problems: list[Problem]) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        remedy = "fix the YAML there: look for a tab, a missing colon, bracket or quote"
        problems.append(Problem(f"is not YAML ({reason})", where, file, remedy))
        return None
    finally:
        if loader is not None:
            loader.dispose()
    for key, line in loader.duplicates:
        problems.append(Problem(f"the key {key!r} occurs twice", f"line {line}", file, "keep one of them"))
    return content


def _apply(document: Document, override: str) -> None:
    """Sets one `key=value` in the content, creating mappings on the way."""
    path, equals, text = override.partition("=")
    path = path.strip()

    def refuse(message: str, remedy: str) -> None:
        document.problems.append(Problem(message, path, OVERRIDE, remedy))

    if not equals or not path:
        return refuse(f"{override!r} is not an override", "write key=value, for example training.epochs=1")
    problems: list[Problem] = []
    value = _parse(text, OVERRIDE, problems)
    if problems:
        return refuse(f"{text!r} is not YAML", "write a number, a text or a [list]")
    container: Any = document.content
    location: list[str | int] = []
    remaining = path
    while True:
        key: str | int
        if isinstance(container, list):
            index, remaining = _list_key(container, remaining)
            if index is None or index >= len(container):
                names = [str(e["name"]) for e in container if isinstance(e, dict) and "name" in e]
                choices = f"choose from: {', '.join(names)}; or " if names else ""
                return refuse("there is no such entry", f"{choices}write [0] to [{len(container) - 1}]")
            key = index
        elif isinstance(container, dict):
            key, remaining = _dict_key(remaining)
            if not key:
                return refuse(f"{path!r} is not a path of keys", "write key.key, or key[0] for an entry of a list")
        else:
            return refuse(f"{location_text(location)} has no keys", "write the path of a single value")
        location.append(key)
        if not remaining:
            container[key] = value
            document.overridden.append(tuple(location))
            return None
        # A key below one that is off or on: the whole key becomes a mapping, such as retention.
        if isinstance(container, dict) and (container.get(key) is None or isinstance(container[key], bool)):
            container[key] = {}
        container = container[key]


def _dict_key(path: str) -> tuple[str, str]:
    """Splits off the key at the beginning of a path, and the dot after it."""
    key = re.split(r"[.\[]", path, maxsplit=1)[0]
    return key, path[len(key) :].removeprefix(".")


def _list_key(entries: list[Any], path: str) -> tuple[int | None, str]:
    """Splits off the entry at the beginning of a path, `[1].…` or `name.…`; of names that match, the longest.

    Returns:
        Index of the entry (None: there is none), and the remaining path.
    """
    index = re.fullmatch(r"\[(\d+)\]\.?(.*)", path, re.DOTALL)
    if index:
        return int(index[1]), index[2]
    named = [(str(e["name"]), i) for i, e in enumerate(entries) if isinstance(e, dict) and "name" in e]
    for name, i in sorted(named, key=lambda pair: -len(pair[0])):
        if path == name or path.startswith(f"{name}."):
            return i, path[len(name) + 1 :]
    return None, path


def location_text(location: Sequence[str | int]) -> str:
    """Writes a location as `tasks[1].data.train`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
