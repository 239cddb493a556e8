"""The two roads to the same results, which tests of loraf take one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from loraf import native, projection


def compiled_library() -> native.Library:
    """The library, or the end of the test: skipped without a compiler, failed where one is there."""
    found = native.library()
    if found is None:
        compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        end = pytest.fail if compilers else pytest.skip
        end(f"the compiled library is not used: {native.why_not()}; install loraf again (make setup)")
    return found


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def road(request) -> Iterator[str]:
    """The tests of a module, once with the compiled library and once without; nothing is remembered in between."""
    projection.forget_digests()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled":
            compiled_library()
        else:
            patch.setattr(native, "library", lambda: None)
        yield request.param
    projection.forget_digests()
