"""The lists of paths in conftest.py name files that exist."""

from __future__ import annotations

import pytest

from tests.conftest import ENGINE, FIRST, SLOW
from tests.source_tree import ROOT


@pytest.mark.parametrize("beginning", sorted({*ENGINE, *SLOW, *(path for path in FIRST if path.startswith("tests/"))}))
def test_a_listed_path_is_the_beginning_of_a_test_file(beginning: str):
    assert [file for file in ROOT.glob(f"{beginning}*") if file.suffix == ".py" or file.is_dir()]
