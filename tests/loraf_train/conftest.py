"""One finished run on a small model, for all tests of the commands; and steady conditions for all tests here."""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

from loraf_train.cli import main
from tests.loraf_train.command_line import TASKS, write_data
from tests.standins import make_model

# A shared machine may be slow at any moment; the same examples every time.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that a second thread only waits, for whole seconds where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.unfreeze()  # see toys.py; libraries complain of leaks otherwise


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A folder with tasks.yaml, data, a base model and the checkpoint of a finished run, and what the run printed."""
    folder = tmp_path_factory.mktemp("trained")
    make_model("llama", folder / "base")
    write_data(folder)
    (folder / "tasks.yaml").write_text(TASKS)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        status = main(["run", "tasks.yaml"])
    assert status == 0, printed.getvalue()
    return folder, printed.getvalue()


@pytest.fixture
def copied(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the trained folder to change, as the working directory."""
    folder = tmp_path / "copied"
    shutil.copytree(trained[0], folder)
    monkeypatch.chdir(folder)
    return folder
