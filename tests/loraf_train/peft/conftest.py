from __future__ import annotations

from pathlib import Path

import pytest

from tests.standins import make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Of a small base model with its tokenizer."""
    return make_model("llama", tmp_path_factory.mktemp("peft") / "base")
