"""`loraf-train remove`, and how the checkpoint works afterwards; new tasks without the data of the old ones."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError, UnknownTask
from tests.loraf import small_checkpoints as small
from tests.loraf.crash_steps import stopped_at
from tests.loraf_train.command_line import TASKS, digests, run

HEAD, UPPER, TRUTH = re.split(r"(?m)^(?=  - name)", TASKS)
NEW = """
model: base
output: ckpt
retention: off
adapter: {rank: 8, sparsity: 0.6, dtype: float32}
calibration: {steps: 1}
training: {learning_rate: 2e-2, batch_size: 8, max_steps: 2, dropout: 0}
tasks:
  - {name: new, sparsity: 0.8, data: {train: new.jsonl, eval: new.jsonl}, max_new_tokens: 2}
"""


def write_new(folder) -> None:
    rows = [{"prompt": f"{word}?", "completion": word} for word in ("ab", "ba", "aa")]
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "new.yaml").write_text(NEW)


def test_removing_the_last_task_frees_its_positions(copied, capsys):
    before, files = manifests.read(copied / "ckpt"), digests(copied / "ckpt")
    status, out, err = run(capsys, "remove", "ckpt", "truth")
    assert (status, err) == (0, "")
    held = before.task("truth").parameters
    assert f"task truth is removed, {held:,} positions are free again" in out
    assert "also removed 1 score of other tasks" in out  # upper, measured with truth on
    after = Checkpoint.open(copied / "ckpt").manifest
    assert after.task_names == ("upper",)
    for module, spec in after.modules.items():
        freed = after.free_positions(module) - before.free_positions(module)
        assert freed == before.task("truth").k[module]
        assert after.free_positions(module) == spec.d_out * 8 - after.task("upper").k[module]
    assert [entry["set"] for entry in after.task("upper").scores] == ["upper"]
    assert after.task("upper").training == before.task("upper").training
    now = digests(copied / "ckpt")
    assert now.keys() == files.keys() - {"tasks/truth.safetensors"}
    assert now["tasks/upper.safetensors"] == files["tasks/upper.safetensors"]
    status, shown, _ = run(capsys, "inspect", "ckpt", "--verify", "--json")
    facts = json.loads(shown)
    assert status == 0 and facts["capacity"]["free"] == facts["capacity"]["positions"] - after.task("upper").parameters
    # Trained again, all files are the same as before.
    status, _, _ = run(capsys, "run", "tasks.yaml")
    assert status == 0 and digests(copied / "ckpt") == files


def test_removing_a_task_that_others_were_trained_on_warns(copied, capsys):
    before = digests(copied / "ckpt")
    status, out, err = run(capsys, "remove", "ckpt", "upper", "--dry-run")
    assert status == 0 and "would be removed" in out and digests(copied / "ckpt") == before
    warning = "warning: truth was trained on top of upper"
    assert warning in err
    status, out, err = run(capsys, "remove", "ckpt", "upper")
    assert status == 0 and "is removed" in out and warning in err and "no longer as trained" in err
    manifest = Checkpoint.open(copied / "ckpt").manifest
    assert manifest.task_names == ("truth",) and manifest.task("truth").trained_with == ("upper",)
    assert manifest.task("truth").scores == ()  # all were measured with upper on
    with pytest.raises(UnknownTask, match="trained on top of upper, which this checkpoint does not have"):
        manifest.as_trained("truth")
    status, shown, _ = run(capsys, "inspect", "ckpt", "--json")
    assert status == 0 and json.loads(shown)["tasks"][0]["as_trained"] is None
    # Scoring and training continue with the remaining tasks.
    write_new(copied)
    (copied / "truth.yaml").write_text(HEAD + TRUTH)
    status, _, err = run(capsys, "eval", "truth.yaml", "--as-trained", "truth")
    assert status == 2 and "trained on top of upper" in err
    status, out, _ = run(capsys, "run", "truth.yaml")
    assert status == 0 and re.search(r"truth as trained +– ", out)
    status, out, _ = run(capsys, "run", "new.yaml")
    assert status == 0
    manifest = Checkpoint.open(copied / "ckpt").manifest
    assert str(manifest.as_trained("new")) == "truth+new"
    assert {entry["set"] for entry in manifest.task("truth").scores} == {"truth"}


def test_a_removed_task_may_be_trained_again_after_those_trained_on_it(copied, capsys):
    run(capsys, "remove", "ckpt", "upper")
    status, _, err = run(capsys, "run", "tasks.yaml", "--no-eval")
    assert status == 2 and "list the tasks in the order truth, upper" in err
    (copied / "tasks.yaml").write_text(HEAD + TRUTH + UPPER)
    status, _, err = run(capsys, "run", "tasks.yaml", "--no-eval")
    assert status == 0, err
    manifest = manifests.read(copied / "ckpt")
    assert manifest.task("upper").trained_with == ("truth",)
    # truth was trained on another upper: there is no warning, and truth is still not as trained.
    status, _, err = run(capsys, "remove", "ckpt", "upper")
    assert (status, err) == (0, "")


def test_statistics_and_named_sets_go_with_the_task(copied, capsys):
    checkpoint = Checkpoint.open(copied / "ckpt")
    checkpoint.set_statistics("truth", b"moments")
    for name, weights in (("both", {"upper": 1.0, "truth": 0.5}), ("off", {"truth": 0.0}), ("one", {"upper": 0.5})):
        checkpoint.set_named_set(name, weights)
    status, _, err = run(capsys, "remove", "ckpt", "upper", "--dry-run")
    assert "The statistics of truth stay, and protect what was answered with upper on" in err
    status, out, _ = run(capsys, "remove", "ckpt", "truth", "--dry-run")
    assert status == 0 and "the named sets both, off with truth would be removed too" in out
    status, out, _ = run(capsys, "remove", "ckpt", "truth")
    assert status == 0 and "task truth is removed with its statistics" in out
    assert "also removed the named sets both, off with truth" in out
    left = manifests.read(copied / "ckpt")
    assert left.sets == {"one": {"upper": 0.5}}
    assert not (copied / "ckpt/statistics/truth.safetensors").exists()


def test_an_unknown_task_or_folder_exits_2(copied, capsys, tmp_path):
    before = digests(copied / "ckpt")
    for name in ("other", "../tasks/upper", "all"):
        status, out, err = run(capsys, "remove", "ckpt", name)
        assert (status, out) == (2, "")
        assert f"there is no task {name!r} → choose from: upper, truth" in err
    status, _, err = run(capsys, "remove", str(tmp_path / "nothing"), "upper")
    assert status == 2 and "there is no loraf.json" in err
    assert digests(copied / "ckpt") == before


def test_a_damaged_task_can_be_removed_and_trained_again(copied, capsys):
    files = digests(copied / "ckpt")
    for damage in (lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
        damage(copied / "ckpt/tasks/truth.safetensors")
        status, _, err = run(capsys, "run", "tasks.yaml", "--set", "tasks.truth.metric=loss")
        assert status == 2 and "truth.safetensors" in err
        assert run(capsys, "remove", "ckpt", "truth")[0] == 0
        assert run(capsys, "run", "tasks.yaml")[0] == 0
        assert digests(copied / "ckpt") == files


# --- failures at any step ---------------------------------------------------------------------------------------------


def test_a_removal_that_fails_at_any_step_leaves_the_checkpoint_before_or_after(tmp_path):
    small.make(tmp_path / "before", tasks=("math", "nlu", "code"))
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    with stopped_at(0, lambda: None) as steps:
        left = Checkpoint.remove_task(tmp_path / "after", "nlu")
    assert left == Checkpoint.open(tmp_path / "after").manifest and left.task_names == ("math", "code")
    expected = digests(tmp_path / "after")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    seen = set()
    for at in range(1, len(steps.names) + 1):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", folder)
        with stopped_at(at, full), pytest.raises(CheckpointError, match="No space left"):
            Checkpoint.remove_task(folder, "nlu")
        names = Checkpoint.open(folder).manifest.task_names
        seen.add(names)
        assert Checkpoint.remove_task(folder, "nlu").task_names == ("math", "code")  # the same command, repeated
        assert digests(folder) == expected
    assert seen == {("math", "nlu", "code"), ("math", "code")}


def test_repeating_a_killed_removal_deletes_the_file_left_behind(copied, capsys):
    file = copied / "ckpt/tasks/truth.safetensors"
    content = file.read_bytes()
    run(capsys, "remove", "ckpt", "truth")
    file.write_bytes(content)
    assert Checkpoint.open(copied / "ckpt").manifest.task_names == ("upper",)  # the stray file is ignored
    status, out, _ = run(capsys, "remove", "ckpt", "truth")
    assert status == 0 and "an interrupted removal" in out and not file.exists()
    assert run(capsys, "remove", "ckpt", "truth")[0] == 2


# --- new tasks without old data --------------------------------------------------------------------------------------


def test_a_new_task_needs_only_the_checkpoint_and_its_own_data(copied, capsys):
    before = digests(copied / "ckpt")
    for name in ("upper.jsonl", "truth.jsonl", "tasks.yaml"):
        (copied / name).unlink()
    write_new(copied)
    status, out, _ = run(capsys, "run", "new.yaml")
    assert status == 0 and "to train: new" in out
    checkpoint = Checkpoint.open(copied / "ckpt")
    assert checkpoint.manifest.task_names == ("upper", "truth", "new")
    assert checkpoint.manifest.task("new").trained_with == ("upper", "truth")
    assert {entry["set"] for entry in checkpoint.manifest.task("new").scores} == {"upper+truth+new"}
    after = digests(copied / "ckpt")
    assert {name for name in after if after[name] != before.get(name)} == {"loraf.json", "tasks/new.safetensors"}
