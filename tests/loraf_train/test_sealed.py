from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf import strict_json
from loraf_train.sealed import seal, unseal

RUNS = sorted((Path(__file__).parents[2] / "examples/compare/results/sequence/runs").glob("*.json"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT.filter(lambda key: key not in ("format", "format_version", "digest")), VALUES, max_size=4))
def test_what_was_sealed_comes_back(content: dict) -> None:
    found, digest = unseal(seal("kind", 3, content), "kind", 3)
    assert found == content and digest == json.loads(seal("kind", 3, content))["digest"]


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(seal("kind", 3, {"number": 1.5, "text": "abc", "list": [1, 2]}))
    place = data.draw(st.integers(0, len(sealed) - 2))  # but for the line's end
    sealed[place] ^= data.draw(st.integers(1, 255))
    try:
        found, _ = unseal(bytes(sealed), "kind", 3)
    except ValueError:
        return
    assert found == {"number": 1.5, "text": "abc", "list": [1, 2]}  # another white space


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
def test_something_else_is_refused(sealed: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unseal(sealed, "kind", 3)


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_the_runs_that_are_committed_are_whole(file: Path) -> None:
    content, _ = unseal(file.read_bytes(), "loraf-compare-run", 1)
    assert seal("loraf-compare-run", 1, content) == file.read_bytes()
