"""A YAML file as plain data, with `--set key=value` applied. Knows nothing of what the keys mean."""

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


@dataclass
class Document:
    """What was read.

    Attributes:
        content: the top mapping; None if there is none to work with.
        problems: what is wrong with the file as YAML, and with the overrides.
        overridden: the locations that overrides replaced.
    """

    content: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    overridden: list[Location] = field(default_factory=list)


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Reads a file; never raises for what the user can mend."""
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
        document.problems.append(Problem("holds no mapping of keys to values", file=str(path), remedy=remedy))
        return document
    document.content = content
    for override in overrides:
        _apply(document, override)
    return document


class _Loader(yaml.SafeLoader):
    """The safe loader, and a note of every key that stands twice (YAML itself would take the last one in silence)."""

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


def _parse(text: str, file: str, problems: list[Problem]) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        remedy = "mend the YAML there: look for a tab, a missing colon, bracket or quote"
        problems.append(Problem(f"is not YAML ({reason})", where, file, remedy))
        return None
    finally:
        if loader is not None:
            loader.dispose()
    for key, line in loader.duplicates:
        problems.append(Problem(f"the key {key!r} stands twice", f"line {line}", file, "keep one of them"))
    return content


def _apply(document: Document, override: str) -> None:
    """Puts one `key=value` into the content, making mappings on the way."""
    path, equals, text = override.partition("=")
    path = path.strip()

    def refuse(message: str, remedy: str) -> None:
        document.problems.append(Problem(message, path, OVERRIDE, remedy))

    if not equals or not path:
        return refuse(f"{override!r} is no override", "write key=value, for example training.epochs=1")
    problems: list[Problem] = []
    value = _parse(text, OVERRIDE, problems)
    if problems:
        return refuse(f"{text!r} is not YAML", "write a number, a text or a [list]")
    container: Any = document.content
    location: list[str | int] = []
    rest = path
    while True:
        if isinstance(container, list):
            key, rest = _list_key(container, rest)
            if key is None or key >= len(container):
                names = [str(e["name"]) for e in container if isinstance(e, dict) and "name" in e]
                choices = f"choose from: {', '.join(names)}; or " if names else ""
                return refuse("there is no such entry", f"{choices}write [0] to [{len(container) - 1}]")
        elif isinstance(container, dict):
            key, rest = re.fullmatch(r"([^.\[]*)\.?(.*)", rest, re.DOTALL).groups()
            if not key:
                return refuse(f"{path!r} is no path of keys", "write key.key, or key[0] for an entry of a list")
        else:
            return refuse(f"{location_text(location)} holds no keys", "write the path of a single value")
        location.append(key)
        if not rest:
            container[key] = value
            document.overridden.append(tuple(location))
            return None
        if isinstance(container, dict) and container.get(key) is None:
            container[key] = {}
        container = container[key]


def _list_key(entries: list[Any], rest: str) -> tuple[int | None, str]:
    """The entry that `rest` begins with, and what follows: `[1].…` or `name.…` (of names with dots the longest)."""
    index = re.fullmatch(r"\[(\d+)\]\.?(.*)", rest, re.DOTALL)
    if index:
        return int(index[1]), index[2]
    named = [(str(e["name"]), i) for i, e in enumerate(entries) if isinstance(e, dict) and "name" in e]
    for name, i in sorted(named, key=lambda pair: -len(pair[0])):
        if rest == name or rest.startswith(f"{name}."):
            return i, rest[len(name) + 1 :]
    return None, rest


def location_text(location: Sequence[str | int]) -> str:
    """`tasks[1].data.train`."""
    out = ""
    for part in location:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out
