from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf.units import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("123456", 123456),
        ("10B", 10),
        ("1kB", 1000),
        ("1KB", 1000),
        ("2GB", 2 * 10**9),
        ("1.5 GB", 1_500_000_000),
        (" 300MB ", 300 * 10**6),
        ("0.5TB", 5 * 10**11),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        (" 2GiB ", 2 << 30),
        ("0.5TiB", 1 << 39),
        ("1e3", 1000),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "GB", "2G", "2Gib", "-1", "0", "0.5", "nan", "inf", "1e400", "x", "1 2", "2 KiB B", "2 kB B"]
)
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size|could not convert"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_250_000_000, "1.25 GB"), (123_456, "123.5 kB"), (2e15, "2000 TB")],
)
def test_a_size_is_written_in_the_largest_decimal_unit(size, text):
    assert size_text(size) == text


@given(st.integers(1, 1 << 50))
def test_a_written_size_reads_as_the_same_size(size):
    # To four digits, then down to whole bytes.
    assert abs(parse_size(size_text(size)) - size) <= 5e-4 * size + 1
    assert len(size_text(size)) <= 9
