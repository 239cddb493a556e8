"""A folder in which a comparison of two tasks can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loraf_train.compare_toys import FILE, write_data
from tests.standins import make_model


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def folder(base_folder, tmp_path) -> Path:
    (tmp_path / "base").symlink_to(base_folder)
    write_data(tmp_path)
    (tmp_path / "tasks.yaml").write_text(FILE)
    return tmp_path
