"""Fixtures that run tests both with the compiled library and with NumPy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from loraf.matrices import native, projection
from tests.tools import needs


def compiled_library() -> native.NativeLibrary:
    """Returns the library. Without it, skips the test if there is no compiler, and fails it otherwise."""
    library = native.library()
    if library is None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip(needs("C++ compiler"))
        pytest.fail(f"the compiled library is not used: {native.why_not()}; install loraf again (make setup)")
    return library


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def with_and_without_library(request) -> Iterator[str]:
    """Runs the tests of a module with and without the compiled library, each with an empty cache of digests."""
    projection.forget_digests()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled":
            compiled_library()
        else:
            patch.setattr(native, "library", lambda: None)
        yield request.param
    projection.forget_digests()
