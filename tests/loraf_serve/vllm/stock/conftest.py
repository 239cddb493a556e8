"""Checkpoints for the tests of a stock `vllm serve`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.standins import make_model, random_checkpoint


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `ckpt` (math, nlu, code), and a PEFT adapter whose name contains an @."""
    root = tmp_path_factory.mktemp("stock-units")
    random_checkpoint(root / "ckpt", make_model("mistral", root / "model"))
    (root / "peft@home").mkdir()
    (root / "peft@home" / "adapter_config.json").write_text("{}")
    return root


@pytest.fixture
def root(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `originals`, as the working directory."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
