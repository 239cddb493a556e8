"""Sealed JSON files are read back, and every other or damaged file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf.files import strict_json
from loraf.files.sealed_json import seal, unseal

FOLDER = Path(__file__).parent / "sealed"  # written before this module moved here; the bytes must stay readable
ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "examples/compare/results/sequence/runs").glob("*.json"))  # only where the example was run
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT.filter(lambda key: key not in ("format", "format_version", "digest")), VALUES, max_size=4))
def test_sealed_content_is_read_back(content: dict) -> None:
    read, digest = unseal(seal("kind", 3, content), "kind", 3)
    assert read == content and digest == json.loads(seal("kind", 3, content))["digest"]


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(seal("kind", 3, {"number": 1.5, "text": "abc", "list": [1, 2]}))
    place = data.draw(st.integers(0, len(sealed) - 2))  # all but the final newline
    sealed[place] ^= data.draw(st.integers(1, 255))
    try:
        content, _ = unseal(bytes(sealed), "kind", 3)
    except ValueError:
        return
    assert content == {"number": 1.5, "text": "abc", "list": [1, 2]}  # only white space changed


@pytest.mark.parametrize(
    ("sealed", "words"),
    [
        (b"", "."),
        (b"[]", "its format is not 'kind'"),
        (seal("other", 3, {}), "its format is not 'kind'"),
        (seal("kind", 2, {}), "another release of loraf wrote it"),
        (seal("kind", 3, {})[:-9], "."),
        (strict_json.dumps({"format": "kind", "format_version": 3}), "it does not match its digest"),
    ],
)
def test_other_content_is_refused(sealed: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unseal(sealed, "kind", 3)


@pytest.mark.parametrize(
    ("file", "kind", "version"),
    [
        (FOLDER / "run.json", "loraf-compare-run", 1),
        (FOLDER / "state.json", "loraf-test-state", 7),
        *((file, "loraf-compare-run", 1) for file in RUNS),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_files_of_earlier_releases_are_read_and_written_alike(file: Path, kind: str, version: int) -> None:
    content, _ = unseal(file.read_bytes(), kind, version)
    assert seal(kind, version, content) == file.read_bytes()


def test_a_committed_file_has_the_expected_content() -> None:
    content, _ = unseal((FOLDER / "state.json").read_bytes(), "loraf-test-state", 7)
    assert content["task"] == "größe “x”\n\t⟦ ⟧ \u0000 😀"
    assert content["integers"] == [0, -1, 2**53, 10**30]
    assert content["floats"] == [0.1, -0.0, 1e300, 5e-324]
