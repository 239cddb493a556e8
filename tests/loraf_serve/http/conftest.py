"""Fixtures of the tests of HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loraf_serve.http.stand import Both


@pytest.fixture(scope="module")
def both(vllm_pool) -> Iterator[Both]:
    """Both doors of the resident engine; files with a server of their own have a fixture of this name."""
    from tests.loraf_serve.http.engine_stand import on_engine

    with on_engine(vllm_pool.get("mistral", "resident"), ["support=math:0.75+code"]) as doors:
        yield doors
