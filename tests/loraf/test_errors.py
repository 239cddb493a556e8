from __future__ import annotations

import pytest

from loraf.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("offline\n\n  and more \n"), "offline and more"),
        (ValueError(), "ValueError"),
        (KeyError("x"), "'x'"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_an_error_becomes_one_line(error, line):
    assert one_line(error) == line


def test_a_long_error_is_cut():
    text = one_line(ValueError("x" * 1000))
    assert text == "x" * 298 + " …" and len(text) == 300
    assert one_line(ValueError("y" * 300)) == "y" * 300
