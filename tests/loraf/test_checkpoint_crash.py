"""A save that is stopped anywhere leaves the old or the new checkpoint, and can be repeated."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError
from tests.loraf import small_checkpoints as small
from tests.loraf.crash_steps import NEW_TASK, save, stopped_at

EARLIER = ("math", "nlu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A folder with the checkpoints `before` and `after` the save."""
    root = tmp_path_factory.mktemp("states")
    small.make(root / "before", tasks=EARLIER)
    shutil.copytree(root / "before", root / "after")
    save(Checkpoint.open(root / "after"))
    return root


@pytest.fixture(scope="module")
def step_names(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted") / "ckpt"
    shutil.copytree(states / "before", folder)
    with stopped_at(0, lambda: None) as steps:
        save(Checkpoint.open(folder))
    return steps.names


def contents(folder: Path) -> dict[str, bytes]:
    return {path: data for path, (data, _) in small.snapshot(folder).items()}


def check_stopped(folder: Path, states: Path, earlier: dict) -> bool:
    """Checks that the checkpoint is the old or the new one, earlier files are unchanged, and the save can be repeated.

    Returns:
        Whether it is the new one.
    """
    opened = Checkpoint.open(folder)
    before, after = manifests.read(states / "before"), manifests.read(states / "after")
    assert opened.manifest in (before, after)
    now = small.snapshot(folder)
    for name in EARLIER:
        assert now[f"tasks/{name}.safetensors"] == earlier[f"tasks/{name}.safetensors"]
    done = opened.manifest == after
    if not done:
        save(opened)
    assert contents(folder) == contents(states / "after")
    assert Checkpoint.open(folder).manifest == after
    return done


def stop_everywhere(states: Path, tmp_path: Path, step_names: list[str], stop, expected) -> None:
    done = []
    for at in range(1, len(step_names) + 1):
        folder = tmp_path / str(at)
        shutil.copytree(states / "before", folder)
        earlier = small.snapshot(folder)
        checkpoint = Checkpoint.open(folder)
        memory = checkpoint.manifest
        with stopped_at(at, stop), pytest.raises(expected):
            save(checkpoint)
        assert checkpoint.manifest == memory
        assert list(checkpoint.tasks) == list(EARLIER)
        assert not list(folder.rglob("*.tmp")), step_names[at - 1]
        done.append(check_stopped(folder, states, earlier))
    # The save takes effect when the manifest is renamed, not before.
    turning = len(step_names) - 1 - step_names[::-1].index("after replace")
    assert done == [False] * turning + [True] * (len(step_names) - turning)


def raiser(error: BaseException):
    def stop():
        raise error

    return stop


def test_a_save_takes_all_expected_steps(step_names):
    """Two files, the task's and the manifest, are each written, flushed and renamed, and their folder is flushed."""
    one_file = [
        "before opening",
        "write nothing",
        "write half",
        "write all",
        "flush",
        "before fsync",
        "after fsync",
        "before replace",
        "after replace",
        "before open",
        "after open",
        "before fsync",
        "after fsync",
    ]
    assert step_names == one_file * 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_system_is_reported_with_the_file(states, tmp_path, step_names, code):
    folder = tmp_path / "ckpt"
    shutil.copytree(states / "before", folder)
    for at in (1, 3, len(step_names) // 2 + 3):
        expected = f"tasks/{NEW_TASK}.safetensors" if at <= len(step_names) // 2 else manifests.FILE_NAME
        with stopped_at(at, raiser(OSError(code, "the system says no"))), pytest.raises(CheckpointError) as caught:
            save(Checkpoint.open(folder))
        assert "the system says no" in str(caught.value)
        assert caught.value.problems[0].file.endswith(expected)
        assert isinstance(caught.value.__cause__, OSError)


def test_an_error_at_any_step_leaves_a_whole_checkpoint(states, tmp_path, step_names):
    stop_everywhere(states, tmp_path, step_names, raiser(OSError(errno.ENOSPC, "disk full")), CheckpointError)


def test_an_interrupt_at_any_step_leaves_a_whole_checkpoint(states, tmp_path, step_names):
    stop_everywhere(states, tmp_path, step_names, raiser(KeyboardInterrupt()), KeyboardInterrupt)


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(states, tmp_path, step_names):
    """SIGKILL prevents any cleanup. Half a temporary file may stay behind, and is ignored."""
    shutil.copytree(states / "before", tmp_path / "before")
    run = subprocess.run(
        [sys.executable, "-m", "tests.loraf.crash_steps", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(step_names)
    earlier = contents(states / "before")
    done, leftovers = [], 0
    for at in range(1, len(step_names) + 1):
        folder = tmp_path / str(at)
        leftovers += len(list(folder.rglob("*.tmp")))
        here = small.snapshot(folder)
        assert all(here[f"tasks/{n}.safetensors"][0] == earlier[f"tasks/{n}.safetensors"] for n in EARLIER)
        done.append(check_stopped(folder, states, here))
    assert done == sorted(done)
    assert set(done) == {False, True}
    assert leftovers > 0  # otherwise all kills came too late


def test_an_interrupted_create_leaves_no_checkpoint_or_an_empty_one(tmp_path, states):
    """Checkpoint.create leaves no checkpoint, or one without tasks."""

    def create(folder):
        return Checkpoint.create(folder, small.BASE, small.RANK, small.SHAPES, seed=0)

    with stopped_at(0, lambda: None) as steps:
        whole = create(tmp_path / "whole").manifest
    for at in range(1, len(steps.names) + 1):
        folder = tmp_path / str(at)
        with stopped_at(at, raiser(OSError(errno.ENOSPC, "disk full"))), pytest.raises(CheckpointError):
            create(folder)
        try:
            opened = Checkpoint.open(folder)
        except CheckpointError as error:
            assert "there is no loraf.json" in str(error)
            opened = create(folder)
        assert opened.manifest == whole
        assert manifests.read(folder) == whole


def test_interrupted_scores_are_stored_or_not(tmp_path, states):
    before = manifests.read(states / "after")
    scores = [{"set": "math", "evaluation": "eval", "metric": "exact", "score": 0.5, "count": 1}]
    at, stopped = 0, True
    while stopped:
        at += 1
        folder = tmp_path / str(at)
        shutil.copytree(states / "after", folder)
        files = small.snapshot(folder)
        checkpoint = Checkpoint.open(folder)
        with stopped_at(at, raiser(OSError(errno.ENOSPC, "disk full"))) as steps:
            try:
                checkpoint.set_scores("math", scores)
            except CheckpointError:
                assert checkpoint.manifest == before
        stopped = len(steps.names) == at
        now = small.snapshot(folder)
        assert {path for path in now if now[path] != files.get(path)} <= {manifests.FILE_NAME}
        opened = Checkpoint.open(folder)
        assert opened.manifest.task("math").scores in ((), tuple(scores))
        opened.set_scores("math", scores)
        assert Checkpoint.open(folder).manifest.task("math").scores == tuple(scores)
    assert at > 10
