"""Reference of the gRPC protocol, generated from the proto files and their comments.

The files are read here as text: protoc would be one more tool to install, and only a small part of the language occurs.
A line that this reader does not understand is an error, not a gap in the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto" / "loraf" / "v1"
FILES = ("generation.proto", "adapter.proto", "info.proto")
SCALARS = {"double", "float", "int32", "int64", "uint32", "uint64", "bool", "string", "bytes"}

_HEADER = re.compile(r'syntax = "proto3";|package [\w.]+;|import ".*";')
_BLOCK = re.compile(r"(message|enum|service|oneof) (\w+) \{(\})?")
_METHOD = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);")
_FIELD = re.compile(r"(optional |repeated )?(map<\w+, \w+>|\w+) (\w+) = (\d+);")
_VALUE = re.compile(r"([A-Z_0-9]+) = (\d+);")


@dataclass
class Member:
    """A field, a method or an enum's value: its head in Markdown, and its comment."""

    head: str
    text: str


@dataclass
class Block:
    """A message, enum or service."""

    kind: str
    name: str
    text: str
    members: list[Member] = field(default_factory=list)


def parse(text: str) -> list[Block]:
    """The blocks of a proto file, in its order.

    Raises:
        ValueError: a line that is not understood.
    """
    blocks: list[Block] = []
    comment: list[str] = []
    oneof = ""
    depth = 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line[2:])
            continue
        prose, comment = _prose(comment), []
        if not line or _HEADER.fullmatch(line):
            continue
        opened = _BLOCK.fullmatch(line)
        if opened:
            kind, name, closed = opened.groups()
            if kind == "oneof":
                oneof = name
            else:
                blocks.append(Block(kind, name, prose))
            depth += 0 if closed else 1
        elif line == "}":
            oneof = ""
            depth -= 1
        elif depth and (method := _METHOD.fullmatch(line)):
            head = f"{_type(method[2])} → {method[3] or ''}{_type(method[4])}"
            blocks[-1].members.append(Member(f"### {blocks[-1].name}.{method[1]}\n\n{head}", prose))
        elif depth and (found := _FIELD.fullmatch(line)):
            notes = [f"One of `{oneof}`."] if oneof else []
            notes += ["Optional."] if found[1] == "optional " else []
            repeated = "repeated " if found[1] == "repeated " else ""
            head = f"`{found[3]} = {found[4]}` {repeated}{_type(found[2])}"
            blocks[-1].members.append(Member(head, " ".join(filter(None, [prose, *notes]))))
        elif depth and (value := _VALUE.fullmatch(line)):
            blocks[-1].members.append(Member(f"`{value[1]} = {value[2]}`", prose))
        else:
            raise ValueError(f"line {number}: {line}")
    return blocks


def markdown() -> str:
    """Services first, then messages and enums."""
    blocks = [block for name in FILES for block in parse((PROTO / name).read_text(encoding="utf-8"))]
    parts: list[str] = []
    for kind, title in (("service", ""), ("message", "## Messages"), ("enum", "## Enums")):
        parts.append(title)
        for block in blocks:
            if block.kind == kind:
                parts += _block(block)
    return "\n\n".join(part for part in parts if part)


def _block(block: Block) -> Iterator[str]:
    if block.kind == "service":
        yield f"## {block.name}"
        yield block.text
        for member in block.members:
            yield member.head
            yield member.text
        return
    yield f"### {block.name}"
    yield block.text
    if not block.members:
        yield "No fields."
    for member in block.members:
        text = (member.text or "—").replace("\n", "\n    ")
        yield f"{member.head}\n:   {text}"


def _type(name: str) -> str:
    return f"*{name}*" if name in SCALARS or name.startswith("map<") else f"[{name}](#{name.lower()})"


def _prose(comment: list[str]) -> str:
    """A comment as Markdown. Its indented lines (`CODE   when`) become a list."""
    paragraphs: list[str] = []
    for line in comment:
        status = re.fullmatch(r"   +([A-Z_]+)  +(.+)", line)
        if status:
            paragraphs.append(f"- `{status[1]}`: {status[2]}")
        elif paragraphs and paragraphs[-1] and (line.startswith("   ") or not paragraphs[-1].startswith("- ")):
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line.strip())
    text = ""
    for paragraph in paragraphs:
        in_list = paragraph.startswith("- ") and text.rpartition("\n")[2].startswith("- ")
        text += f"{chr(10) if in_list else chr(10) * 2}{paragraph}" if text else paragraph
    return text.replace("<", "&lt;").replace("*", r"\*")
