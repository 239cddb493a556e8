"""What the pages point to exists: links, anchors, and files named in code. No page is unreadable on a narrow screen."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import DOCS, PAGES, PROJECT, README, ROOT, anchors, links, name, read
from tools.docs import hooks

LONGEST_README = 150  # lines
WIDEST_CELL = 120  # characters
_NAMED = re.compile(
    r"(?<![\w./~-])((?:tests|benchmarks|examples|loraf|loraf_train|loraf_serve|proto|docs|tools)"
    r"/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|json|jsonl|md|yaml|proto|cpp|svg|png|f32|sh|txt)\b|(?<=/)(?![\w.<*{…-])))"
)


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        address = urlsplit(target)
        if address.scheme or address.netloc:
            if address.scheme != "https" or "." not in address.netloc:
                broken.append(f"{target}: not an https address")
            continue
        file = (page.parent / address.path).resolve() if address.path else page
        if not file.is_relative_to(ROOT) or not file.exists():
            broken.append(f"{target}: no such file")
        elif address.fragment and file.suffix == ".md":
            text = hooks.fill(read(file)) if file in DOCS else read(file)
            if address.fragment not in anchors(text):
                broken.append(f"{target}: no such heading")
    assert broken == []


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=name)
def test_files_that_a_page_names_exist(page):
    named = set(_NAMED.findall(read(page)))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_a_missing_file_would_be_found():
    text = "see `tests/loraf/test_nothing.py`, `loraf_train/nowhere/`, `tasks/math.safetensors` and ./examples/x.py"
    assert _NAMED.findall(text) == ["tests/loraf/test_nothing.py", "loraf_train/nowhere/"]


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_cell_of_a_table_is_wider_than_a_line(page):
    rows = [line for line in read(page).splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(re.sub(r"\]\([^)]*\)", "]", cell)) > WIDEST_CELL] == []


def test_every_page_of_docs_is_reached_from_the_readme():
    reached: set[Path] = set()
    waiting = [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / urlsplit(target).path).resolve() for target in links(page)}
        waiting += [file for file in targets if file in DOCS and file not in reached]
    # the site's own entry is its menu
    assert [name(page) for page in DOCS if page not in reached and page != ROOT / "docs" / "index.md"] == []
