"""README, the pages of docs/ and the examples' READMEs, taken apart for the tests of this folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = [README, *DOCS, *EXAMPLES]
PROJECT = [ROOT / file for file in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md") if (ROOT / file).is_file()]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)(?: +\{#([\w-]+)\})?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """All fenced blocks in one of the languages, of all pages."""
    return [
        Block(page, text.count("\n", 0, match.start()) + 2, match[2], match[3])
        for page in PAGES
        for text in [read(page)]
        for match in _FENCE.finditer(text)
        if match[2] in languages
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def inline_code(page: Path) -> Iterator[str]:
    yield from _INLINE.findall(prose(page))


def links(page: Path) -> Iterator[str]:
    yield from _LINK.findall(_INLINE.sub("", prose(page)))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and MkDocs both write them."""
    found = set()
    for heading, given in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(given or re.sub(r"\s", "-", plain))
    return found
