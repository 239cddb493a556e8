"""Trackers: each phase of a task is one tracked run, with the losses that the observer receives."""

from __future__ import annotations

import importlib.machinery
import os
import socket
import sys
import time
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf_train.processes import group
from loraf_train.sequence import runner
from loraf_train.trainer import trackers
from tests.loraf_train import toys
from tests.loraf_train.command_line import digests
from tests.standins import make_model


class Losses(runner.Observer):
    def __init__(self):
        self.by_phase: dict[str, list[float]] = {}
        self._task = ""

    def task_started(self, task):
        self._task = task.name

    def calibration_step(self, loss, step, total):
        self.by_phase.setdefault(f"{self._task}/calibration", []).append(loss)

    def step(self, loss, lr, step, total):
        self.by_phase.setdefault(f"{self._task}/training", []).append(loss)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


def train(model_folder, output, *report_to: str, names=("one", "two"), **training) -> dict[str, list[float]]:
    """Losses by task/phase."""
    tasks = [toys.task(name, sparsity=0.75, training={"report_to": report_to, **training}) for name in names]
    observer = Losses()
    data = {name: toys.data(3 + i) for i, name in enumerate(names)}
    runner.run(toys.run_config(model_folder, output, *tasks), data, observer)
    return observer.by_phase


@pytest.mark.slow
def test_tensorboard_has_a_run_for_each_phase_and_the_checkpoint_does_not_change(model_folder, tmp_path):
    losses = train(model_folder, tmp_path / "tracked", "tensorboard")
    train(model_folder, tmp_path / "untracked")
    runs = tmp_path / "tracked" / trackers.RUNS
    folders = {str(file.parent.relative_to(runs)) for file in runs.rglob("events.out.*")}
    assert (
        folders
        == set(losses)
        == {f"{task}/{phase}" for task in ("one", "two") for phase in ("calibration", "training")}
    )
    for name, expected in losses.items():
        events = EventAccumulator(str(runs / name)).Reload()
        scalars = events.Scalars("train/loss")
        assert [event.step for event in scalars] == list(range(1, len(expected) + 1))
        assert [event.value for event in scalars] == pytest.approx(
            expected, rel=1e-4
        )  # float32, and rounded by Trainer
        assert len(events.Scalars("train/learning_rate")) == len(expected)
    tracked, untracked = (Checkpoint.open(tmp_path / name).manifest for name in ("tracked", "untracked"))
    assert tracked.adapter_digest == untracked.adapter_digest
    assert not (tmp_path / "untracked" / trackers.RUNS).exists()
    kept = {name for name in digests(tmp_path / "tracked") if not name.startswith("runs/")}
    assert kept == set(digests(tmp_path / "untracked"))


def test_only_the_first_process_writes(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(group, "is_first", lambda: False)
    tracking = trackers.Tracking(("tensorboard",), tmp_path, "t", "training")
    with trackers.opened(tracking) as callbacks:
        assert callbacks == ()


@pytest.fixture
def wandb(monkeypatch):
    """A fake of the package: the part that `WandbCallback` and this project use, recording their calls.

    It fails on a phase that is logged into another's run, and on a run that is finished twice.
    """
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.run, module.runs = None, []

    class Config(dict):
        def update(self, other, allow_val_change=False):
            super().update(other)

    class Run:
        def __init__(self, settings):
            self.settings, self.logged, self.exit_code = settings, [], None
            self.summary = {}

        def _label(self, **_): ...

        def finish(self, exit_code=None):
            assert self.exit_code is None, "finished twice"
            self.exit_code, module.run = exit_code, None

    def init(**settings):
        assert module.run is None, "the previous run is still open"
        module.run = Run(settings)
        module.config = Config()
        module.runs.append(module.run)
        return module.run

    module.init = init
    module.config = Config()
    module.log = lambda entry: module.run.logged.append(entry)
    module.define_metric = lambda *a, **k: None
    utilities = types.ModuleType("wandb.sdk.lib.config_util")
    utilities.ConfigError = type("ConfigError", (Exception,), {})
    for name, part in {"wandb": module, "wandb.sdk.lib.config_util": utilities}.items():
        monkeypatch.setitem(sys.modules, name, part)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.mark.slow
def test_wandb_has_a_run_for_each_phase(model_folder, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")  # must not upload the base model
    losses = train(model_folder, tmp_path / "ckpt", "wandb")
    assert [run.settings["name"] for run in wandb.runs] == list(losses)
    assert [run.settings["group"] for run in wandb.runs] == ["ckpt/one", "ckpt/one", "ckpt/two", "ckpt/two"]
    assert {run.settings["project"] for run in wandb.runs} == {"loraf"}
    assert [run.exit_code for run in wandb.runs] == [0] * 4
    for run, expected in zip(wandb.runs, losses.values(), strict=True):
        logged = [entry["train/loss"] for entry in run.logged if "train/loss" in entry]
        assert logged == pytest.approx(expected, rel=1e-4)


def test_the_run_of_a_failed_phase_is_closed_as_failed(model_folder, tmp_path, wandb, monkeypatch):
    def broken(*step):
        raise RuntimeError("pulled")

    monkeypatch.setattr(Losses, "step", broken)
    with pytest.raises(RuntimeError, match="pulled"):
        train(model_folder, tmp_path / "ckpt", "wandb", "tensorboard", names=("one",))
    ends = [(run.settings["name"], run.exit_code) for run in wandb.runs]
    assert ends == [("one/calibration", 0), ("one/training", 1)]
    assert wandb.run is None


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_reported_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    config = toys.run_config(
        tmp_path,
        tmp_path,
        toys.task("a", training={"report_to": ("tensorboard",)}),
        toys.task("b", training={"report_to": ("tensorboard", "wandb")}),
    )
    first, second = trackers.missing(config)
    assert (first.field, first.remedy) == ("training.report_to", "`pip install tensorboard`, or leave tensorboard out")
    assert "'wandb'" in second.message and second.file == str(config.file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: name)
    assert trackers.missing(config) == []


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a store of files, read by a client of its own."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def runs_of(mlflow, experiment: str) -> dict:
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run for run in found}


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_phase(model_folder, tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", "true")  # must not upload the base model
    losses = train(model_folder, tmp_path / "ckpt", "mlflow")
    runs, client = runs_of(mlflow, "loraf"), mlflow.MlflowClient()
    assert set(runs) == set(losses)
    for name, expected in losses.items():
        run = runs[name]
        assert (run.info.status, run.data.tags["loraf.task"]) == ("FINISHED", name.split("/")[0])
        logged = client.get_metric_history(run.info.run_id, "loss")
        assert [(m.step, m.value) for m in logged] == [
            (i, pytest.approx(loss, rel=1e-4)) for i, loss in enumerate(expected, 1)
        ]
        assert client.list_artifacts(run.info.run_id) == []


def test_mlflow_closes_a_failed_run_and_uses_the_named_experiment(model_folder, tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")

    def broken(*step):
        raise RuntimeError("pulled")

    monkeypatch.setattr(Losses, "step", broken)
    with pytest.raises(RuntimeError, match="pulled"):
        train(model_folder, tmp_path / "ckpt", "mlflow", names=("one",))
    ends = {name: run.info.status for name, run in runs_of(mlflow, "mine").items()}
    assert ends == {"one/calibration": "FINISHED", "one/training": "FAILED"}


def test_a_store_that_mlflow_cannot_open_is_a_mistake(tmp_path, mlflow):
    mlflow.set_tracking_uri("nothing://here")
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"),
        trackers.opened(trackers.Tracking(("mlflow",), tmp_path, "t", "training")),
    ):
        pass


def test_a_server_of_mlflow_that_nobody_answers_is_soon_reported(tmp_path, mlflow, monkeypatch):
    """By default MLflow tries again and again, for minutes."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setattr(trackers, "_RETRIES_AT_START", "1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{closed.getsockname()[1]}")
        begin = time.monotonic()
        with (
            pytest.raises(ConfigError, match="MLflow cannot open a run"),
            trackers.opened(trackers.Tracking(("mlflow",), tmp_path, "t", "training")),
        ):
            pass
    assert time.monotonic() - begin < 30 and "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_server_of_mlflow_that_goes_away_ends_the_run_with_a_message(model_folder, tmp_path, mlflow, monkeypatch):
    def gone(*arguments, **keywords):
        raise mlflow.exceptions.MlflowException("nobody answers")

    monkeypatch.setattr(mlflow, "log_metrics", gone)
    monkeypatch.setattr(mlflow, "flush_async_logging", gone)
    with pytest.raises(ConfigError, match=r"MLflow cannot log \(nobody answers\).*goes on where it was"):
        train(model_folder, tmp_path / "ckpt", "mlflow", names=("one",))


def test_wandb_without_a_login_is_a_mistake(tmp_path, wandb, monkeypatch):
    def refused(**settings):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refused)
    with (
        pytest.raises(ConfigError, match=r"api_key not configured \(no-tty\).*wandb login"),
        trackers.opened(trackers.Tracking(("wandb",), tmp_path, "t", "training")),
    ):
        pass
