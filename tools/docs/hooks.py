"""Hooks of the documentation site (mkdocs.yml): generated parts of pages, and links to files of the repository.

    <!-- generate: NAME -->        in a page is replaced with what GENERATORS[NAME] returns
    [text](../README.md)           a link to a file outside docs/ becomes the file's path, or a link below `repo_url`

Generated parts are made from the code when the site is built and are not committed, so they cannot be out of date.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.docs import commands, grpc_reference, limits, rooms, settings, versions  # noqa: E402  (after the path is set)

GENERATORS: dict[str, Callable[[], str]] = {
    "settings": settings.markdown,
    "loraf-train": lambda: commands.markdown("loraf-train"),
    "loraf-serve": lambda: commands.markdown("loraf-serve"),
    "loraf-serve check": commands.check_markdown,
    "loraf-client": lambda: commands.markdown("loraf-client"),
    "grpc": grpc_reference.markdown,
    "limits": limits.markdown,
    "versions": versions.markdown,
    "rooms": rooms.markdown,
}
MARKER = re.compile(r"^<!-- generate: (.+?) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with the Markdown of each page."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    return fill(rewrite_links(markdown, Path(source), config.get("repo_url") or ""))


def fill(markdown: str) -> str:
    """The page with its generated parts.

    Raises:
        KeyError: a marker names no generator.
    """
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def rewrite_links(markdown: str, source: Path, repository: str = "") -> str:
    """Replaces links to files of the repository that are not part of the site.

    Args:
        source: the page's file.
        repository: address that files are linked below; empty: the path is written instead of a link.
    """
    fences = [match.span() for match in _FENCE.finditer(markdown)]

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if (
            any(start <= match.start() < end for start, end in fences)
            or "://" in target
            or target.startswith("mailto:")
        ):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if repository:
            return f"[{match['text']}]({repository.rstrip('/')}/blob/main/{name})"
        return f"`{name}`" if match["text"].strip("`") == name else f"{match['text']} (`{name}`)"

    return _LINK.sub(replaced, markdown)
