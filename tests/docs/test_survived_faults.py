"""The tests that docs/reference/survived-faults.md names exist, and it names enough faults."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, read
from tests.source_tree import syntax_tree

PAGE = next(page for page in DOCS if page.name == "survived-faults.md")
FEWEST = 45
_BASE = re.compile(r"^Tests below `([\w/]+)/`", re.MULTILINE)
_TEST = re.compile(r"`([\w./]+\.py)::(test_\w+)`")


def rows() -> list[tuple[str, str, str]]:
    """(fault, test file, test) of every row; a file's path is relative to the folder that its section names."""
    found = []
    for section in read(PAGE).split("\n## ")[1:]:
        base = ROOT / _BASE.search(section)[1]
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if line.startswith("| ") and cells[0] != "Fault" and not cells[0].startswith("---"):
                file, test = _TEST.fullmatch(cells[-1]).groups()
                found.append((cells[0], str((base / file).resolve().relative_to(ROOT)), test))
    return found


@cache
def names_in(file: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(syntax_tree(file)) if isinstance(node, kinds)}


def test_at_least_45_faults_are_named_once():
    faults = [fault for fault, _, _ in rows()]
    assert len(faults) >= FEWEST and len(set(faults)) == len(faults)


def test_every_fault_has_a_test_of_its_own():
    tests = [(file, test) for _, file, test in rows()]
    assert len(set(tests)) == len(tests)


@pytest.mark.parametrize(("fault", "file", "test"), rows())
def test_the_named_test_exists(fault, file, test):
    assert (ROOT / file).is_file(), file
    assert test in names_in(ROOT / file)
