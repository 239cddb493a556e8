"""One process at a time writes to a checkpoint's folder, and a new folder survives a crash of the machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError
from loraf.files import durable_folder, folder_lock
from loraf.files.folder_lock import FILE_NAME, locked
from tests.loraf import small_checkpoints as small
from tests.source_tree import ROOT

HOLD = """
import sys
from pathlib import Path
from loraf.files.folder_lock import locked
with locked(Path(sys.argv[1]), "loraf-train run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path / "ckpt"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "ckpt")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_told_who_holds_it(tmp_path, other):
    with pytest.raises(CheckpointError) as caught, locked(tmp_path / "ckpt", "loraf-train import"):
        pass
    text = str(caught.value)
    assert f"loraf-train run, process {other.pid} on {os.uname().nodename}, since 20" in text
    assert str(tmp_path / "ckpt") in text and "wait until it has ended" in text


def test_it_ends_with_the_process_even_if_killed(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "ckpt" / FILE_NAME).exists()  # left behind, and it stops nobody
    with locked(tmp_path / "ckpt", "loraf-train run"):
        assert json.loads((tmp_path / "ckpt" / FILE_NAME).read_bytes())["pid"] == os.getpid()


def test_it_ends_where_the_process_gives_it_back(tmp_path, other):
    other.communicate("")
    assert other.returncode == 0 and not (tmp_path / "ckpt").exists()  # nothing was written into it
    with locked(tmp_path / "ckpt", "loraf-train run"), locked(Path(tmp_path / "x" / ".." / "ckpt"), "again"):
        small.make(tmp_path / "ckpt")
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["loraf.json", "tasks"]


def test_readers_need_no_lock(tmp_path, other):
    (tmp_path / "made").mkdir()
    small.make(tmp_path / "made")
    for file in sorted((tmp_path / "made").iterdir()):
        file.rename(tmp_path / "ckpt" / file.name)
    assert Checkpoint.open(tmp_path / "ckpt").manifest.task_names == small.TASKS


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 4000, b'{"pid": 1}', b"x" * 10_000])
def test_a_damaged_file_only_hides_the_holder(tmp_path, other, content):
    (tmp_path / "ckpt" / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="another process is writing to it →"), locked(tmp_path / "ckpt", "x"):
        pass


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    with locked(tmp_path, "loraf-train run"):
        pass


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"), locked(tmp_path / "file" / "ckpt", "x"):
        pass


def test_every_new_folder_s_parent_is_flushed(tmp_path, monkeypatch):
    flushed: list[Path] = []
    monkeypatch.setattr(durable_folder, "flush_folder", lambda folder: flushed.append(folder))
    Checkpoint.create(tmp_path / "a" / "b" / "ckpt", small.BASE, small.RANK, small.SHAPES, seed=0)
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "ckpt"]
