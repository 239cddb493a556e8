"""Whole runs on small random models: what is written, kept and refused, and that the files hold what was trained."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import ConfigError
from loraf.manifest import positions_per_matrix
from loraf.tasksets import TaskSet
from loraf_train.adapter.layer import LorafLinear
from loraf_train.sequence import runner
from loraf_train.sequence.conflicts import conflicts
from loraf_train.settings.data import RecordSource
from loraf_train.settings.parts import AdapterConfig
from tests.loraf_train import toys
from tests.standins import make_model

NAMES = ("one", "two", "three")
MOVES = {"one": 3, "two": 50, "three": 90}


def all_data() -> dict:
    return {name: toys.data(move) for name, move in MOVES.items()}


def tasks(**changes) -> list:
    """Three tasks with different alphas, sparsities and kinds of training."""
    return [
        toys.task("one", alpha=16.0, sparsity=0.7, training={"dropout": 0.2}, **changes),
        toys.task("two", alpha=40.0, sparsity=0.75, calibration={"optimizer": "sgd"}, **changes),
        toys.task("three", alpha=24.0, sparsity=0.8, training={"micro_batch_size": 4, "schedule": "linear"}, **changes),
    ]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("loraf.json", ".lock"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


PROBE = toys.batch(toys.examples(7, 6))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE["input_ids"], attention_mask=PROBE["attention_mask"]).logits.clone()


class NoTokenizer:
    """A tokenizer without a padding token."""

    pad_token_id = eos_token_id = None


class Watcher(runner.Observer):
    """Records the events of a run, and the model's logits at each."""

    def __init__(self):
        self.events: list[str] = []
        self.losses: dict[str, list[float]] = {}
        self.totals: set[int] = set()
        self.with_layers: dict[str, torch.Tensor] = {}
        self.merged: dict[str, torch.Tensor] = {}
        self.bare: dict[str, torch.Tensor] = {}
        self.files: dict[str, dict[str, str]] = {}

    def task_kept(self, checkpoint, task):
        self.events.append(f"kept {task.name}")

    def task_started(self, task):
        self.events.append(f"started {task.name}")
        self.losses[task.name] = []

    def calibration_step(self, loss, step, total):
        self.events.append(f"calibration {step}/{total}")

    def calibrated(self, task):
        self.events.append(f"calibrated {task.name}")

    def step(self, loss, lr, step, total):
        self.events.append(f"step {step}/{total}")
        list(self.losses.values())[-1].append(loss)

    def trained(self, task, model):
        self.events.append(f"trained {task.name}")
        assert any(isinstance(m, LorafLinear) for m in model.modules())
        self.with_layers[task.name] = logits(model)

    def task_finished(self, checkpoint, task, model):
        self.events.append(f"finished {task.name}")
        assert not any(isinstance(m, LorafLinear) for m in model.modules())
        self.bare[task.name] = logits(model)
        merger = Merger(model, checkpoint)
        merger.merge(checkpoint.manifest.as_trained(task.name))
        self.merged[task.name] = logits(model)
        merger.merge(TaskSet())
        self.files[task.name] = digests(checkpoint.path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("mistral", tmp_path_factory.mktemp("mistral"))


@dataclasses.dataclass
class Finished:
    config: object
    checkpoint: Checkpoint
    watcher: Watcher
    model: object
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A run of three tasks, each trained on top of the ones before."""
    config = toys.run_config(model_folder, tmp_path_factory.mktemp("run") / "ckpt", *tasks())
    loaded = runner.load_model(config)
    weights = {name: tensor.clone() for name, tensor in loaded[0].state_dict().items()}
    watcher = Watcher()
    checkpoint = runner.run(config, all_data(), watcher, loaded)
    return Finished(config, checkpoint, watcher, loaded[0], weights)


def test_every_task_owns_exactly_k_positions_of_each_matrix_that_no_other_owns(finished):
    manifest = Checkpoint.open(finished.config.output).manifest
    assert manifest.task_names == NAMES
    assert len(manifest.modules) == 6 and {m.rsplit(".", 1)[-1] for m in manifest.modules} == {
        "q_proj",
        "v_proj",
        "down_proj",
    }
    for module, spec in manifest.modules.items():
        owned = []
        for task in finished.config.tasks:
            positions = finished.checkpoint.tasks[task.name][module].positions.tolist()
            assert (
                len(positions)
                == manifest.task(task.name).k[module]
                == positions_per_matrix(task.sparsity, spec.d_out, 8)
            )
            owned += positions
        assert len(owned) == len(set(owned)) and max(owned) < spec.d_out * 8


def test_every_task_learned_something(finished):
    for name, losses in finished.watcher.losses.items():
        assert losses[-1] < losses[0] - 0.05
        values = torch.cat([b.values for b in finished.checkpoint.tasks[name].values()])
        assert values.dtype == torch.bfloat16 and (values != 0).float().mean() > 0.9


def test_training_a_task_leaves_earlier_files_unchanged(finished):
    files = finished.watcher.files
    for i, name in enumerate(NAMES):
        assert set(files[name]) == {f"tasks/{n}.safetensors" for n in NAMES[: i + 1]}
        for later in NAMES[i:]:
            assert files[name].items() <= files[later].items()
    assert files["three"] == digests(finished.config.output)


def test_the_base_model_is_unchanged(finished):
    state = finished.model.state_dict()
    assert state.keys() == finished.weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in finished.weights.items())
    assert all(torch.equal(bare, finished.watcher.bare["one"]) for bare in finished.watcher.bare.values())


def test_as_trained_gives_the_model_that_training_ended_with(finished):
    """Layers in training against weights merged right after it, and those against weights merged from the files now."""
    merger = Merger(finished.model, Checkpoint.open(finished.config.output))
    try:
        for name in NAMES:
            trained, then = finished.watcher.with_layers[name], finished.watcher.merged[name]
            assert (trained - then).norm() <= 1e-5 * then.norm()
            assert (then - finished.watcher.bare[name]).norm() > 0.1 * then.norm()
            merger.merge(finished.checkpoint.manifest.as_trained(name))
            assert torch.equal(logits(finished.model), then)
    finally:
        merger.merge(TaskSet())


def test_the_observer_receives_all_events_in_order(finished):
    expected = []
    for name in NAMES:
        expected += [f"started {name}", "calibration 1/2", "calibration 2/2", f"calibrated {name}"]
        expected += [*(f"step {i}/4" for i in range(1, 5)), f"trained {name}", f"finished {name}"]
    assert finished.watcher.events == expected


def test_the_manifest_records_how_each_task_was_trained(finished):
    manifest = finished.checkpoint.manifest
    assert [task.trained_with for task in manifest.tasks] == [(), ("one",), ("one", "two")]
    assert manifest.base_model.name == finished.config.model
    for task, asked in zip(manifest.tasks, finished.config.tasks, strict=True):
        assert (task.alpha, task.sparsity, task.dtype) == (asked.alpha, asked.sparsity, "bfloat16")
        assert task.templates == all_data()[task.name].templates
        assert task.training["steps"] == 4 and task.training["examples"] == 24
        assert task.training["loss"]["first"] == finished.watcher.losses[task.name][0]
        assert task.training["precision"] == "float32"
        assert set(task.training["versions"]) == {"loraf", "torch", "transformers"}
        settings = task.training["settings"]
        assert settings["training"]["learning_rate"] == 2e-2 and settings["calibration"]["steps"] == 2
        assert settings["data"]["train"] == [{"file": f"{task.name}.jsonl"}]


def test_a_repeated_run_writes_the_same_files_and_another_seed_others(finished, tmp_path):
    again = finished.config.model_copy(update={"output": tmp_path / "again", "tasks": finished.config.tasks[:2]})
    torch.rand(5)  # numbers drawn before have no effect
    runner.run(again, all_data())
    assert digests(again.output) == finished.watcher.files["two"]
    other = again.model_copy(update={"output": tmp_path / "other", "seed": 1, "tasks": again.tasks[:1]})
    runner.run(other, all_data())
    assert digests(other.output) != finished.watcher.files["one"]


def test_a_run_adds_the_missing_tasks_to_a_checkpoint(finished, tmp_path):
    """One task, then the whole file: the first one's data are not read, and the result equals that of a single run."""
    first = finished.config.model_copy(update={"output": tmp_path / "ckpt", "tasks": finished.config.tasks[:1]})
    runner.run(first, all_data())
    watcher, asked = Watcher(), []

    def give(task):
        asked.append(task.name)
        return all_data()[task.name]

    whole = finished.config.model_copy(update={"output": tmp_path / "ckpt"})
    runner.run(whole, give, watcher)
    assert asked == ["two", "three"] and watcher.events[:2] == ["kept one", "started two"]
    assert digests(whole.output) == digests(finished.config.output)
    manifest = (whole.output / "loraf.json").read_bytes()
    watcher = Watcher()
    runner.run(whole, give, watcher)
    assert watcher.events == ["kept one", "kept two", "kept three"] and asked == ["two", "three"]
    assert (whole.output / "loraf.json").read_bytes() == manifest


def refused(config, finished, loaded=None) -> str:
    """The message of a refused run, which must not write anything."""
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    watcher = Watcher()
    model = loaded or (finished.model, runner.load_model(config)[1], Path(config.model))
    with pytest.raises(ConfigError) as error:
        runner.run(config, all_data(), watcher, model)
    assert watcher.events == []
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before
    return str(error.value)


def edited(config, name: str, **changes):
    """The configuration with one task changed; `training`, `calibration` and `data` are mappings of the changes."""

    def change(task):
        update = dict(changes)
        for part in ("training", "calibration", "data"):
            if part in update:
                update[part] = getattr(task, part).model_copy(update=update[part])
        return task.model_copy(update=update)

    return config.model_copy(update={"tasks": tuple(change(t) if t.name == name else t for t in config.tasks)})


def test_each_edited_setting_of_a_finished_task_is_refused_by_name(finished):
    config = edited(finished.config, "one", alpha=17.0, training={"learning_rate": 0.5, "epochs": 9.0})
    config = edited(config, "two", calibration={"steps": 5}, start="base")
    config = edited(config, "three", data={"train": (RecordSource(file=Path("/data/more.jsonl")),), "prompt": "{q}"})
    text = refused(config, finished)
    for part in (
        "tasks[0].alpha: task 'one' was trained with 16.0, but the file says 17.0",
        "tasks[0].training.learning_rate: task 'one' was trained with 0.02, but the file says 0.5",
        "tasks[0].training.epochs: task 'one' was trained with 1.0, but the file says 9.0",
        "tasks[1].calibration.steps: task 'two' was trained with 2, but the file says 5",
        "tasks[1].start: task 'two' was trained with 'previous', but the file says 'base'",
        "tasks[2].data.train: task 'three' was trained with [three.jsonl], but the file says [more.jsonl]",
        "tasks[2].data.prompt: task 'three' was trained with none, but the file says '{q}'",
        "set it to 16.0, give the task another name, or name another output folder",
    ):
        assert part in text, text
    assert len(re.findall(r"^\d+\.", text, re.M)) == 7


def test_settings_that_do_not_affect_the_values_may_change(finished):
    config = edited(
        finished.config, "one", metric="loss", training={"micro_batch_size": 1, "gradient_checkpointing": True}
    )
    moved = config.model_copy(update={"file": Path("/elsewhere/tasks.yaml")})
    for name in NAMES:
        moved = edited(moved, name, data={"train": (RecordSource(file=Path(f"/elsewhere/{name}.jsonl")),)})
    watcher = Watcher()
    loaded = (finished.model, None, Path(config.model))
    runner.run(moved, all_data(), watcher, loaded)
    assert watcher.events == ["kept one", "kept two", "kept three"]


def test_a_setting_missing_from_an_old_record_counts_as_its_default(finished):
    record = finished.checkpoint.manifest.task("one").training
    del record["settings"]["training"]["weight_decay"]
    try:
        manifest, folder = finished.checkpoint.manifest, Path(finished.config.model)
        shapes = {name: (m.d_out, m.d_in) for name, m in manifest.modules.items()}
        assert conflicts(finished.config, manifest, folder, shapes) == []
        changed = edited(finished.config, "one", training={"weight_decay": 0.1})
        (problem,) = conflicts(changed, manifest, folder, shapes)
        assert "was trained with 0.0, but the file says 0.1" in problem.message
    finally:
        record["settings"]["training"]["weight_decay"] = 0.0


def test_another_base_rank_seed_std_and_target_are_all_reported(finished, tmp_path):
    other = make_model("mistral", tmp_path / "other", seed=1)
    adapter = AdapterConfig(rank=9, sparsity=0.75, target_modules=("q_proj", "up_proj"), init_std=0.5)
    config = finished.config.model_copy(update={"model": str(other), "seed": 4, "adapter": adapter})
    text = refused(config, finished)
    for part in (
        "base_model.fingerprint",
        f"set model to {finished.config.model}, or name another output folder",
        "adapter.rank: the checkpoint in",
        "has 8, but the file says 9",
        "seed: the checkpoint",
        "has 0, but the file says 4",
        "adapter.init_std",
        "has none, but the file says 0.5",
        "adapter.target_modules",
        "has ['q_proj', 'v_proj', 'down_proj'], but the file says ['q_proj', 'up_proj']",
    ):
        assert part in text, text
    assert "--allow-other-base" not in text


def test_a_new_task_before_a_finished_one_is_refused(finished):
    new = toys.task("new", sparsity=0.95)
    one, two, three = finished.config.tasks
    for order in ((new, one, two, three), (one, three, two)):
        text = refused(finished.config.model_copy(update={"tasks": order}), finished)
        assert "list the tasks in the order one, two, three" in text
    assert "tasks[1]: 'three' is listed where 'two' was trained" in text


def test_too_few_positions_for_a_later_task_are_reported_before_any_training(model_folder, finished, tmp_path):
    config = toys.run_config(
        model_folder,
        tmp_path / "ckpt",
        toys.task("a", sparsity=0.4),
        toys.task("b", sparsity=0.7),
        toys.task("c", sparsity=0.6),
    )
    text = refused(config, finished)
    assert "tasks[2].sparsity: task 'c' needs" in text and "a sparsity of 0.9" in text
    assert not config.output.exists()


def test_too_few_positions_left_by_the_tasks_of_a_checkpoint_are_reported(finished):
    tasks_of = (*finished.config.tasks, toys.task("four", sparsity=0.5))
    text = refused(finished.config.model_copy(update={"tasks": tasks_of}), finished)
    assert "tasks[3].sparsity: task 'four' needs 512 positions in" in text and "but only 257 of 1024 are left" in text


def test_unknown_and_unsupported_target_modules_are_refused_with_the_choices(finished, tmp_path):
    config = toys.run_config(
        finished.config.model,
        tmp_path / "x",
        toys.task("a"),
        adapter={"target_modules": ("q_proj", "query", "self_attn")},
    )
    text = refused(config, finished)
    assert (
        "the model has no 'query' → choose from: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in text
    )
    assert "'self_attn' is a MistralAttention, not a torch.nn.Linear" in text


def test_start_base_trains_on_the_bare_model_at_positions_that_no_task_owns(model_folder, finished, tmp_path):
    config = toys.run_config(model_folder, tmp_path / "ckpt", *tasks(start="base")[:2])
    watcher = Watcher()
    checkpoint = runner.run(config, all_data(), watcher, (finished.model, NoTokenizer(), model_folder))
    assert [task.trained_with for task in checkpoint.manifest.tasks] == [(), ()]
    for module in checkpoint.manifest.modules:
        one, two = (set(checkpoint.tasks[name][module].positions.tolist()) for name in ("one", "two"))
        assert not one & two
    for name in ("one", "two"):
        batch = toys.batch(all_data()[name].train)
        with torch.no_grad():
            bare = finished.model(**batch).loss.item()
        assert watcher.losses[name][0] == pytest.approx(bare, rel=0.1)  # a mini-batch of the same
        assert (watcher.with_layers[name] - watcher.merged[name]).norm() <= 1e-5 * watcher.merged[name].norm()


def test_values_are_rounded_before_the_next_task_starts(finished, tmp_path):
    """With float32 values in the checkpoint the first task is not rounded, so the second starts from other values."""
    adapter = finished.config.adapter.model_copy(update={"dtype": "float32"})
    config = finished.config.model_copy(
        update={"output": tmp_path / "ckpt", "adapter": adapter, "tasks": finished.config.tasks[:2]}
    )
    watcher = Watcher()
    exact = runner.run(config, all_data(), watcher)
    for module, b in exact.tasks["one"].items():
        assert b.values.dtype == torch.float32
        rounded = finished.checkpoint.tasks["one"][module]
        assert torch.equal(b.positions, rounded.positions) and torch.equal(b.values.bfloat16(), rounded.values)
        assert not torch.equal(b.values, rounded.values.float())
    assert watcher.losses["one"] == finished.watcher.losses["one"]
    assert watcher.losses["two"] != finished.watcher.losses["two"]


def test_values_beyond_the_stored_dtype_are_refused(model_folder, finished, tmp_path):
    config = toys.run_config(
        model_folder,
        tmp_path / "ckpt",
        toys.task("a", training={"learning_rate": 1e5, "max_steps": 1}),
        adapter={"dtype": "float16"},
    )
    with pytest.raises(ConfigError, match="adapter.dtype: task 'a': values of .* are too large for float16"):
        runner.run(config, {"a": toys.data(3)}, None, (finished.model, NoTokenizer(), model_folder))
    assert Checkpoint.open(config.output).manifest.tasks == ()


def test_an_observer_that_leaves_weights_merged_is_an_error(model_folder, tmp_path):
    class Careless(runner.Observer):
        def task_finished(self, checkpoint, task, model):
            Merger(model, checkpoint).merge(checkpoint.manifest.all_tasks())

    config = toys.run_config(model_folder, tmp_path / "ckpt", toys.task("one"))
    with pytest.raises(RuntimeError, match="left a task merged"):
        runner.run(config, all_data(), Careless())


def test_a_bfloat16_model_trains_with_float32_values(model_folder, tmp_path):
    config = toys.run_config(model_folder, tmp_path / "ckpt", toys.task("one"), precision="bfloat16")
    watcher = Watcher()
    checkpoint = runner.run(config, all_data(), watcher)
    assert checkpoint.manifest.task("one").training["precision"] == "bfloat16"
    assert watcher.losses["one"][-1] < watcher.losses["one"][0] - 0.05
    trained, then = watcher.with_layers["one"], watcher.merged["one"]
    assert (trained - then).norm() < 0.05 * then.norm()
