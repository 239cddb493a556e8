"""Fixtures that several test files of the serving package share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.loraf_serve.pki import make_pki

if TYPE_CHECKING:
    from tests.loraf_serve.vllm_engines import Pool


@pytest.fixture(scope="session")
def vllm_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """vLLM engines, each started once."""
    from tests.loraf_serve.vllm_engines import Pool

    pool = Pool(tmp_path_factory.mktemp("vllm"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_pki`."""
    return make_pki(tmp_path_factory.mktemp("pki"))
