"""A run that stops anywhere and is restarted ends with the same bytes as one that never stopped."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

import loraf
from loraf import checkpoint as checkpoints
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError
from loraf.files.sealed_json import seal, unseal
from loraf_train.adapter.dropout import TokenKeys
from loraf_train.sequence import resume, runner
from loraf_train.trainer import loop
from tests.loraf.crash_steps import stopped_at
from tests.loraf_train import toys
from tests.loraf_train.interruptions import Stopped, Stopper, contents, data, run_config
from tests.standins import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("mistral", tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """(loaded model, the files of an uninterrupted run that saved no state, its observer)"""
    config = run_config(model_folder, tmp_path_factory.mktemp("whole") / "ckpt", seconds=1e6)
    loaded = runner.load_model(config)
    observer = Stopper()
    runner.run(config, data(), observer, loaded)
    return loaded, contents(config.output), observer


@pytest.fixture(scope="module")
def alone(whole, model_folder, tmp_path_factory):
    """(loaded model, the files of an uninterrupted run of the first task alone)"""
    config = run_config(model_folder, tmp_path_factory.mktemp("alone") / "ckpt", 1e6, ("one",))
    resume_run(config, whole[0])
    return whole[0], contents(config.output)


def stop(config, loaded, *at: str) -> None:
    with pytest.raises(Stopped):
        runner.run(config, data(), Stopper(*at), loaded)


def resume_run(config, loaded, other_data=None) -> Stopper:
    observer = Stopper()
    runner.run(config, other_data or data(), observer, loaded)
    return observer


@pytest.fixture
def config(model_folder, tmp_path):
    return run_config(model_folder, tmp_path / "ckpt")


@pytest.fixture
def single(model_folder, tmp_path):
    """The first task alone."""
    return run_config(model_folder, tmp_path / "ckpt", names=("one",))


# --- anywhere --------------------------------------------------------------------------------------------------------

# A step is reported before its state is saved, so a run that stops there resumes from the step before.
PLACES = {
    ("one", "calibration 1"): ["calibration 1", "calibration 2"],
    ("one", "calibrated"): ["resumes after calibration", "step 1"],
    ("one", "step 2"): ["resumes after training step 1 of 6", "step 2"],
    ("one", "step 3"): ["resumes after training step 2 of 6", "step 3"],
    ("one", "step 4"): ["resumes after training step 3 of 6", "step 4"],
    ("two", "calibration 2"): ["resumes after calibration step 1 of 2", "calibration 2"],
    ("two", "step 1"): ["resumes after calibration", "step 1"],
    ("two", "step 6"): ["resumes after training step 5 of 6", "step 6"],
    ("two", "trained"): ["resumes after training step 6 of 6", "trained"],
    ("two", "finished"): [],
}


@pytest.mark.parametrize("at", PLACES, ids="-".join)
def test_a_stopped_run_resumes_there_and_ends_with_the_same_bytes(whole, config, at):
    loaded, files, uninterrupted = whole
    stop(config, loaded, *at)
    observer = resume_run(config, loaded)
    assert contents(config.output) == files
    assert [event for _, event in observer.events[:2]] == PLACES[at]
    assert observer.remarks == []
    events = [event for event in observer.events if not event[1].startswith("resumes")]
    expected = uninterrupted.events
    assert events == expected[len(expected) - len(events) :]  # nothing twice, nothing left out


def test_a_run_stopped_again_and_again_ends_with_the_same_bytes(whole, config):
    loaded, files, uninterrupted = whole

    class Impatient(Stopper):
        def record(self, event):
            super().record(event)
            if len(self.events) == 3:  # "resumes", and two more
                raise Stopped

    attempts = 0
    finished = False
    while not finished:
        attempts += 1
        try:
            runner.run(config, data(), Impatient(), loaded)
            finished = True
        except Stopped:
            pass
    assert attempts > len(uninterrupted.events) // 3
    assert contents(config.output) == files


def test_a_run_stopped_between_saves_resumes_from_the_end_of_the_phase_before(alone, model_folder, tmp_path):
    loaded, files = alone
    config = run_config(model_folder, tmp_path / "ckpt", 3600, ("one",))
    stop(config, loaded, "one", "step 5")
    observer = resume_run(config, loaded)
    assert [event for _, event in observer.events[:2]] == ["resumes after calibration", "step 1"]
    assert contents(config.output) == files


@pytest.mark.parametrize("forgotten", ["optimizer", "schedule", "position", "dropout"])
def test_bytes_differ_if_any_part_of_the_state_is_not_restored(alone, single, monkeypatch, forgotten):
    """So the tests above would fail if it were forgotten."""
    loaded, files = alone
    stop(single, loaded, "one", "step 5")
    trainer = loop._Trainer
    if forgotten == "optimizer":
        monkeypatch.setattr(loop, "_restore_optimizer", lambda *parts: None)
    elif forgotten == "schedule":
        monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: self._restore())
    elif forgotten == "position":
        monkeypatch.setattr("transformers.trainer.skip_first_batches", lambda batches, count: batches)
    else:
        tokens_of = TokenKeys.set
        monkeypatch.setattr(TokenKeys, "set", lambda self, step, *tokens: tokens_of(self, step - 4, *tokens))
    resume_run(single, loaded)
    assert contents(single.output).keys() == files.keys()
    assert contents(single.output)["tasks/one.safetensors"] != files["tasks/one.safetensors"]


# --- in the middle of a write ----------------------------------------------------------------------------------------


def test_a_run_stopped_between_a_tasks_file_and_the_manifest_commits_it_again(alone, single, monkeypatch):
    loaded, files = alone
    write = checkpoints.write_durably

    def stopping(target, content):
        if target.name == "loraf.json" and (single.output / "tasks/one.safetensors").exists():
            raise Stopped
        write(target, content)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_durably", stopping)
        stop(single, loaded)
    assert Checkpoint.open(single.output).manifest.tasks == ()
    assert (single.output / "tasks/one.safetensors").read_bytes() == files["tasks/one.safetensors"]
    observer = resume_run(single, loaded)
    assert observer.events[0] == ("one", "resumes after training step 6 of 6")
    assert contents(single.output) == files


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_a_full_disk_is_reported_with_the_file_and_the_run_can_be_resumed(alone, model_folder, tmp_path):
    """At a sample of the system calls that write."""
    loaded, files = alone
    counted = run_config(model_folder, tmp_path / "counted", names=("one",))
    with stopped_at(0, full) as steps:
        resume_run(counted, loaded)
    assert contents(counted.output) == files
    assert len(steps.names) > 150
    for at in range(7, len(steps.names), len(steps.names) // 5):
        config = run_config(model_folder, tmp_path / str(at), names=("one",))
        with stopped_at(at, full), pytest.raises(CheckpointError) as caught:
            resume_run(config, loaded)
        (problem,) = caught.value.problems
        assert "No space left on device" in problem.message and str(config.output) in problem.file
        assert "free disk space" in problem.remedy and "run the same command again" in problem.remedy
        assert not list(config.output.rglob("*.tmp"))
        if (config.output / "loraf.json").exists():
            Checkpoint.open(config.output)
        resume_run(config, loaded)
        assert contents(config.output) == files, steps.names[at - 1]


def test_leftovers_of_killed_writes_are_removed(alone, single):
    loaded, files = alone
    stop(single, loaded, "one", "step 4")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = [f".loraf.json.{dead.pid}.tmp", f"tasks/.one.safetensors.{os.getpid()}.tmp"]
    leftovers += [f".resume/.state-9.json.{dead.pid}.tmp", ".resume/state-12.safetensors"]
    for name in leftovers:
        (single.output / name).write_bytes(b"half")
    (single.output / f".loraf.json.{os.getppid()}.tmp").write_bytes(b"of one that lives")
    resume_run(single, loaded)
    now = contents(single.output)
    assert now.pop(f".loraf.json.{os.getppid()}.tmp") == b"of one that lives"
    assert now == files


def test_the_state_of_a_finished_task_is_removed_by_a_run_with_nothing_to_do(whole, config):
    loaded, files, _ = whole
    stop(config, loaded, "two", "trained")
    kept = contents(config.output / resume.FOLDER)
    resume_run(config, loaded)
    (config.output / resume.FOLDER).mkdir()
    for name, content in kept.items():  # as if the run had been killed right after the commit
        (config.output / resume.FOLDER / name).write_bytes(content)
    resume.tidy(config.output, ["one"])
    assert contents(config.output / resume.FOLDER) == kept  # of another run, whose task is not finished
    resume_run(config, loaded)
    assert contents(config.output) == files


# --- states that cannot be used --------------------------------------------------------------------------------------


def state_files(config) -> list:
    return sorted((config.output / resume.FOLDER).iterdir(), key=lambda path: (int(path.stem.split("-")[1]), path.name))


def test_two_states_are_kept_and_are_not_part_of_the_checkpoint(whole, config):
    loaded, files, _ = whole
    stop(config, loaded, "two", "step 4")
    states = state_files(config)
    assert [path.suffix for path in states] == [".json", ".safetensors"] * 2
    record = json.loads(states[-2].read_text())
    assert (record["task"], record["step"], record["steps"]) == ("two", 3, 6)
    assert Checkpoint.open(config.output).manifest.task_names == ("one",)
    assert contents(config.output)["tasks/one.safetensors"] == files["tasks/one.safetensors"]


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path) -> None:
    """Overwrites it with another state's tensors."""
    path.write_bytes(path.with_name("state-7.safetensors").read_bytes())


DAMAGE = {
    "a bit of the tensors": lambda record, tensors: flip(tensors),
    "half of the tensors": lambda record, tensors: tensors.write_bytes(tensors.read_bytes()[:500]),
    "no tensors": lambda record, tensors: tensors.unlink(),
    "another's tensors": lambda record, tensors: exchange(tensors),
    "a bit of the record": lambda record, tensors: flip(record),
    "no record": lambda record, tensors: record.write_bytes(b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_skipped_and_the_one_before_is_used(alone, single, kind):
    loaded, files = alone
    stop(single, loaded, "one", "step 6")
    states = state_files(single)
    assert states[0].name == "state-7.json"  # 3 of calibration, and then of step 4 and 5
    DAMAGE[kind](*states[2:])
    observer = resume_run(single, loaded)
    assert observer.events[0] == ("one", "resumes after training step 4 of 6")
    (remark,) = observer.remarks
    assert "state-8.json cannot be used" in remark
    assert contents(single.output) == files


def test_without_a_usable_state_the_task_starts_from_the_beginning(alone, single):
    loaded, files = alone
    stop(single, loaded, "one", "step 6")
    for path in state_files(single):
        flip(path)
    observer = resume_run(single, loaded)
    assert observer.events[0] == ("one", "calibration 1") and len(observer.remarks) == 2
    assert contents(single.output) == files


def run_until_task_two(config, loaded, other_data=None) -> Stopper:
    """The observer of a run that stops at the second task's first step."""
    observer = Stopper("two", "calibration 1")
    with pytest.raises(Stopped):
        runner.run(config, other_data or data(), observer, loaded)
    return observer


def test_a_state_of_other_settings_data_or_versions_is_not_used_and_the_reason_is_reported(
    whole, model_folder, config, monkeypatch
):
    loaded, _, _ = whole
    stop(config, loaded, "two", "step 4")
    faster = run_config(model_folder, config.output, learning_rate=0.03, epochs=3.0)
    faster = faster.model_copy(update={"tasks": (config.tasks[0], faster.tasks[1])})
    (remark,) = run_until_task_two(faster, loaded).remarks
    assert remark == (
        "the saved state of the interrupted training cannot be used: training.learning_rate was 0.02, is 0.03; "
        "training.epochs was 2.0, is 3.0"
    )
    more = data() | {"two": toys.data(50, 19)}
    (remark,) = run_until_task_two(config, loaded, more).remarks
    assert remark.endswith("cannot be used: the training data changed")
    with monkeypatch.context() as patched:
        patched.setattr(loraf, "__version__", "99.0")
        (remark,) = run_until_task_two(config, loaded).remarks
    assert remark.endswith(f"cannot be used: versions.loraf was {loraf.__version__!r}, is '99.0'")
    renamed = config.tasks[1].model_copy(update={"name": "two-b"})
    other = config.model_copy(update={"tasks": (config.tasks[0], renamed)})
    observer = Stopper("two-b", "calibration 1")
    with pytest.raises(Stopped):
        runner.run(other, data() | {"two-b": data()["two"]}, observer, loaded)
    assert observer.remarks == ["the saved state of the interrupted task 'two' is discarded"]
    assert resume_run(config, loaded).events[0][1] == "resumes after training step 3 of 6"  # the state was only read


def test_after_an_edit_the_result_is_that_of_a_fresh_run(alone, model_folder, single, tmp_path):
    loaded, files = alone
    stop(single, loaded, "one", "step 4")
    edited = run_config(model_folder, single.output, names=("one",), learning_rate=0.03)
    observer = resume_run(edited, loaded)
    assert observer.events[0] == ("one", "calibration 1") and "learning_rate" in observer.remarks[0]
    fresh = run_config(model_folder, tmp_path / "fresh", names=("one",), learning_rate=0.03)
    resume_run(fresh, loaded)
    assert contents(single.output) == contents(fresh.output) != files


def test_a_run_may_resume_with_smaller_micro_batches_and_remarks_on_it(alone, model_folder, single):
    """As users do when memory runs out."""
    loaded, files = alone
    stop(single, loaded, "one", "step 4")
    smaller = run_config(model_folder, single.output, names=("one",), micro_batch_size=1)
    observer = resume_run(smaller, loaded)
    assert observer.events[0] == ("one", "resumes after training step 3 of 6")
    assert observer.remarks == ["the environment changed, so the last bits may differ: micro_batch_size was 4, is 1"]
    assert contents(single.output).keys() == files.keys()


# --- states from before dropout was drawn by token --------------------------------------------------------------------


def as_before(config) -> None:
    """Takes out of every state that dropout is drawn by token, which states of earlier versions do not say."""
    for file in (config.output / resume.FOLDER).glob("state-*.json"):
        record, _ = unseal(file.read_bytes(), *resume._SEAL)
        assert record["making"].pop("dropout") == "by token"
        file.write_bytes(seal(*resume._SEAL, record))


def test_a_task_begun_before_that_is_finished_as_it_was_begun(alone, single, monkeypatch, tmp_path):
    """tests/golden has a state that an earlier version wrote. This one is stopped and resumed twice."""
    loaded, files = alone
    before = single.model_copy(update={"output": tmp_path / "before"})
    with monkeypatch.context() as patched:
        patched.setattr(loop.Journal, "dropout_by_token", False)
        patched.setattr(resume.ResumeStore, "_drawn_before", lambda self, record: False)
        make = resume.ResumeStore.__init__

        def made(self, *arguments, **keywords):
            make(self, *arguments, **keywords)
            self.dropout_by_token = False

        patched.setattr(resume.ResumeStore, "__init__", made)
        resume_run(before, loaded)
        stop(single, loaded, "one", "step 3")
    expected = contents(before.output)
    assert expected["tasks/one.safetensors"] != files["tasks/one.safetensors"]
    as_before(single)
    stop(single, loaded, "one", "step 5")
    observer = resume_run(single, loaded)
    assert observer.events[0] == ("one", "resumes after training step 4 of 6")
    assert [remark.partition(",")[0] for remark in observer.remarks] == ["an earlier version began this task"]
    assert contents(single.output) == expected


def test_such_a_task_says_that_another_cut_of_the_batch_changes_it(alone, model_folder, single):
    loaded, _ = alone
    stop(single, loaded, "one", "step 4")
    as_before(single)
    smaller = run_config(model_folder, single.output, names=("one",), micro_batch_size=1)
    (remark,) = resume_run(smaller, loaded).remarks
    assert remark.endswith("the values will differ as with another seed: micro_batch_size was 4, is 1")


def test_a_state_of_a_task_without_dropout_says_nothing_of_it(alone, model_folder, single):
    loaded, _ = alone
    plain = run_config(model_folder, single.output, names=("one",), dropout=0.0)
    stop(plain, loaded, "one", "step 4")
    assert all("dropout" not in json.loads(path.read_text())["making"] for path in state_files(plain)[::2])
    assert resume_run(plain, loaded).remarks == []
