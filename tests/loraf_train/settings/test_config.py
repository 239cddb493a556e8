"""tasks.yaml: what it resolves to, and that every mistake is reported with its field and a remedy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraf.errors import ConfigError
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.data import DataConfig
from loraf_train.settings.loading import draft, load
from loraf_train.settings.parts import AdapterConfig, CalibrationConfig, TrainingConfig

WHOLE_FILE = """
model: mistralai/Mistral-7B-v0.1
output: ./ckpt
seed: 0
adapter: {rank: 64, sparsity: 0.9, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
calibration: {steps: 32, optimizer: adamw}
training: {learning_rate: 1e-4, batch_size: 32, epochs: 1, max_length: 512, dropout: 0.05, warmup_steps: 0,
           weight_decay: 0.0, max_grad_norm: 1.0, schedule: constant}
tasks:
  - name: math
    alpha: 64
    training: {learning_rate: 5e-4, epochs: 3}
    data: {train: gsm8k/train.jsonl, eval: gsm8k/test.jsonl, prompt: "{question}\\n…", completion: "{answer}"}
    metric: gsm8k
  - name: nlu
    alpha: 128
    data:
      train: [boolq/train.json, openbookqa/train.json]
      eval:
        boolq: {file: boolq/test.json, choices: ["true", "false"]}
        openbookqa: {file: openbookqa/test.json, choices: [answer1, answer2, answer3, answer4]}
      prompt: "{instruction}\\n"
      completion: "{output}"
    metric: choice
"""
SMALL = {
    "model": "tiny",
    "output": "ckpt",
    "tasks": [
        {"name": "a", "data": {"train": "a.jsonl", "eval": "a.jsonl"}},
        {"name": "b.c", "data": {"train": "a.jsonl"}, "training": {"epochs": 2}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "boolq/train.json", "boolq/test.json", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    for name in ("openbookqa/train.json", "openbookqa/test.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def write(folder: Path, content: str | dict) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def changed(**parts) -> dict:
    """SMALL with values replaced: `tasks__0__alpha=3`."""
    content = copy.deepcopy(SMALL)
    for path, value in parts.items():
        *keys, last = path.split("__")
        place = content
        for key in keys:
            place = place[int(key)] if key.isdigit() else place.setdefault(key, {})
        place[last] = value
    return content


def problems_of(path: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    """field → (message, remedy)."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return {p.field: (p.message, p.remedy) for p in caught.value.problems}


def test_a_whole_file_resolves_with_defaults_and_overrides(folder):
    config = load(write(folder, WHOLE_FILE))
    assert config.model == "mistralai/Mistral-7B-v0.1"
    assert config.output == folder / "ckpt"
    assert (config.adapter.rank, config.adapter.sparsity, len(config.adapter.target_modules)) == (64, 0.9, 7)
    math, nlu = config.tasks
    assert (math.training.learning_rate, math.training.epochs, math.training.batch_size) == (5e-4, 3, 32)
    assert (nlu.training.learning_rate, nlu.training.epochs) == (1e-4, 1)  # YAML 1.1 reads 1e-4 as text
    assert (math.alpha, nlu.alpha) == (64, 128)
    assert (math.calibration.learning_rate, nlu.calibration.learning_rate) == (5e-4, 1e-4)
    assert (math.calibration.steps, math.calibration.batch_size) == (32, 32)
    assert math.sparsity == nlu.sparsity == 0.9
    assert [s.file for s in nlu.data.train] == [folder / "boolq/train.json", folder / "openbookqa/train.json"]
    assert {n: s.choices for n, s in nlu.data.eval.items()}["boolq"] == ("true", "false")
    assert list(math.data.eval) == ["gsm8k"]  # named after the folder, since «test» says nothing
    assert math.data.prompt == "{question}\n…"


def test_defaults_are_the_papers(folder):
    task = load(write(folder, SMALL)).tasks[0]
    assert task.training == TrainingConfig(
        learning_rate=1e-4,
        batch_size=32,
        epochs=1,
        max_length=512,
        dropout=0.05,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        schedule="constant",
    )
    assert task.alpha == AdapterConfig().rank == 64
    assert (task.sparsity, task.metric, task.start) == (0.9, None, "previous")


def test_a_task_inherits_the_runs_start_unless_it_has_its_own(folder):
    config = load(write(folder, changed(start="base", tasks__1__start="previous")))
    assert [task.start for task in config.tasks] == ["base", "previous"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tensorboard", ("tensorboard",)),
        (["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ("none", ()),
        (["none"], ()),
        (None, ()),
        ([], ()),
    ],
)
def test_trackers_may_be_written_as_for_transformers(folder, written, meant):
    tasks = load(write(folder, changed(training={"report_to": written, "packing": True}))).tasks
    assert [(task.training.report_to, task.training.packing) for task in tasks] == [(meant, True)] * 2


def test_a_task_inherits_what_it_does_not_override(folder):
    content = changed(training={"epochs": 5, "batch_size": 4}, calibration={"steps": 3, "learning_rate": 0.5})
    content["tasks"][1]["calibration"] = {"optimizer": "sgd"}
    task = load(write(folder, content)).tasks[1]
    assert (task.training.epochs, task.training.batch_size) == (2, 4)
    assert (task.calibration.steps, task.calibration.optimizer, task.calibration.learning_rate) == (3, "sgd", 0.5)


def test_configs_can_be_built_in_code():
    task = TaskConfig(name="a", alpha=1.0, sparsity=0.5, data=DataConfig(train="anywhere.jsonl"))
    config = RunConfig(model="tiny", output=Path("out"), tasks=(task,))
    assert config.tasks[0].calibration == CalibrationConfig()
    with pytest.raises(ValueError, match="frozen"):
        task.alpha = 2.0


def test_a_local_model_folder_is_relative_to_the_file(folder, monkeypatch):
    (folder / "models/mine").mkdir(parents=True)
    monkeypatch.chdir("/")
    assert load(write(folder, changed(model="models/mine"))).model == str(folder / "models/mine")
    assert load(write(folder, changed(model="org/name"))).model == "org/name"


def test_all_mistakes_are_reported_at_once(folder):
    content = changed(
        adapter={"sparsity": 1.5},
        trainin={"epochs": 1},
        tasks__0__metric="gsm9k",
        tasks__1__name="a",
        tasks__1__data__train="missing.jsonl",
    )
    problems = problems_of(write(folder, content))
    assert problems == {
        "adapter.sparsity": ("1.5 is out of range", "use a number above 0 and below 1, for example 0.9"),
        "trainin": ("is not a known key", "did you mean 'training'?"),
        "tasks[0].metric": (
            "'gsm9k' is not known",
            f"use {', '.join(DEFAULT_NEW_TOKENS)}, or your own module:function",
        ),
        "tasks[1].name": ("another task is named 'a' too", "give each task its own name"),
        "tasks[1].data.train": (f"there is no file {folder}/missing.jsonl", f"paths are relative to {folder}"),
    }
    with pytest.raises(ConfigError) as caught:
        load(folder / "tasks.yaml")
    assert {p.file for p in caught.value.problems} == {str(folder / "tasks.yaml")}


@pytest.mark.parametrize(
    ("change", "field", "message", "remedy"),
    [
        ({"adapter__rank": 0}, "adapter.rank", "0 is out of range", "whole number from 1"),
        ({"adapter__rank": 4097}, "adapter.rank", "4097 is out of range", "from 1 to 4096"),
        ({"adapter__rank": 1.5}, "adapter.rank", "1.5 is not a whole number", "whole number"),
        ({"adapter__sparsity": 0}, "adapter.sparsity", "out of range", "above 0"),
        ({"adapter__sparsity": 1}, "adapter.sparsity", "out of range", "below 1"),
        ({"adapter__sparsity": True}, "adapter.sparsity", "True is not a number", "above 0"),
        ({"adapter__target_modules": []}, "adapter.target_modules", "is empty", "q_proj"),
        ({"adapter__init_std": 0}, "adapter.init_std", "out of range", "above 0"),
        ({"adapter__dtype": "int8"}, "adapter.dtype", "'int8' is not known", "bfloat16"),
        ({"training__learning_rate": 0}, "training.learning_rate", "out of range", "above 0"),
        ({"training__learning_rate": "fast"}, "training.learning_rate", "'fast' is not a number", "1e-4"),
        ({"training__learning_rate": float("inf")}, "training.learning_rate", "out of range", "above 0"),
        ({"training__batch_size": 0}, "training.batch_size", "out of range", "whole number from 1"),
        ({"training__batch_size": True}, "training.batch_size", "True is not a number", "whole number"),
        ({"training__dropout": 1.0}, "training.dropout", "out of range", "not including, 1"),
        ({"training__dropout": -0.1}, "training.dropout", "out of range", "from 0"),
        ({"training__schedule": "step"}, "training.schedule", "not known", "cosine"),
        ({"training__gradient_checkpointing": 7}, "training.gradient_checkpointing", "neither true nor", "true or"),
        ({"training__packing": "rows"}, "training.packing", "neither true nor", "true or"),
        ({"training__report_to": "comet"}, "training.report_to", "'comet' is not known", "tensorboard, wandb"),
        ({"training__report_to": ["wandb", 3]}, "training.report_to[1]", "3 is not known", "tensorboard, wandb"),
        ({"training": 3}, "training", "3 is not a mapping", "mapping"),
        ({"calibration__steps": 0}, "calibration.steps", "out of range", "from 1"),
        ({"calibration__optimizer": "lion"}, "calibration.optimizer", "not known", "adamw or sgd"),
        ({"seed": -1}, "seed", "out of range", "from 0"),
        ({"seed": 1 << 32}, "seed", "out of range", "4294967295"),
        ({"recipe": "mine"}, "recipe", "not known", "paper"),
        ({"precision": "int8"}, "precision", "not known", "float32"),
        ({"revision": 1.0}, "revision", "is not text", "quotes"),
        ({"tasks": []}, "tasks", "is empty", "at least one task"),
        ({"tasks": "a"}, "tasks", "'a' is not a list", "at least one task"),
        ({"tasks__0__name": "all"}, "tasks[0].name", "'all' is reserved", "other than"),
        ({"tasks__0__name": "Maths!"}, "tasks[0].name", "not a valid task name", "a-z"),
        ({"tasks__0__name": 3}, "tasks[0].name", "3 is not text", "quotes"),
        ({"tasks__0__alpha": 0}, "tasks[0].alpha", "out of range", "above 0"),
        ({"tasks__0__learning_rate": 1}, "tasks[0].learning_rate", "not a known key", "under calibration"),
        ({"tasks__0__training__epoch": 1}, "tasks[0].training.epoch", "not a known key", "'epochs'"),
        ({"tasks__0__data": {}}, "tasks[0].data.train", "is missing", "add it"),
        ({"tasks__0__data__train": []}, "tasks[0].data.train", "is empty", "data file"),
        ({"tasks__0__data__train": ["a.jsonl", "b.jsonl"]}, "tasks[0].data.train[1]", "no file", "relative to"),
        ({"tasks__0__data__train": "./tasks.yaml"}, "tasks[0].data.train", "not in a known format", ".jsonl"),
        ({"tasks__0__data__train": {"file": "b.csv"}}, "tasks[0].data.train.file", "no file", "relative to"),
        (
            {"tasks__0__data__train": {"split": "train"}},
            "tasks[0].data.train",
            "does not name a source",
            "file: or dataset:",
        ),
        ({"tasks__0__data__eval": {"x": "b.csv"}}, "tasks[0].data.eval.x", "no file", "relative to"),
        ({"tasks__0__data__eval": {"mean": "a.jsonl"}}, "tasks[0].data.eval", "'mean' is reserved", "another name"),
        ({"tasks__0__data__eval": ["a.jsonl", "./a.jsonl"]}, "tasks[0].data.eval", "named 'a'", "eval: {name"),
        ({"tasks__0__data__prompt": "{question"}, "tasks[0].data.prompt", "is not a template", "{{"),
        ({"tasks__0__data__prompt": "{}"}, "tasks[0].data.prompt", "does not name a field", "name of a record's field"),
        ({"tasks__0__data__prompt": "{q.__class__}"}, "tasks[0].data.prompt", "does not name a field", "name of"),
        ({"tasks__0__data__limit": 0}, "tasks[0].data.limit", "out of range", "from 1"),
        ({"tasks__0__metric": "choice"}, "tasks[0].data.eval", "needs choices", "choices:"),
    ],
)
def test_a_mistake_names_its_field_and_a_remedy(folder, change, field, message, remedy):
    problems = problems_of(write(folder, changed(**change)))
    assert list(problems) == [field]
    assert message in problems[field][0]
    assert remedy in problems[field][1]


@pytest.mark.parametrize("key", ["model", "output", "tasks"])
def test_a_missing_required_key_is_reported(folder, key):
    content = copy.deepcopy(SMALL)
    del content[key]
    assert problems_of(write(folder, content))[key][0] == "is missing"


def test_choices_that_yaml_reads_as_booleans_are_explained(folder):
    content = changed(
        tasks__0__metric="choice", tasks__0__data__eval={"x": {"file": "a.jsonl", "choices": [True, "b"]}}
    )
    problems = problems_of(write(folder, content))
    assert problems == {"tasks[0].data.eval.x.choices[0]": ("True is not text", "put it in quotes")}


def test_yaml_that_does_not_parse_names_the_line(folder):
    path = write(folder, "model: tiny\noutput: [ckpt\ntasks: 1\n")
    (field, (message, _)) = next(iter(problems_of(path).items()))
    assert field.startswith("line 3")
    assert "is not YAML" in message


def test_a_duplicate_key_names_its_line(folder):
    path = write(folder, yaml.safe_dump(SMALL) + "model: other\n")
    line = path.read_text().count("\n")
    assert problems_of(path) == {f"line {line}": ("the key 'model' occurs twice", "keep one of them")}


@pytest.mark.parametrize("content", ["", "3", "- a\n- b\n", "\x00"])
def test_a_file_without_a_mapping_is_refused(folder, content):
    assert problems_of(write(folder, content))


def test_a_missing_or_binary_file_is_refused(folder):
    assert "no such file" in problems_of(folder / "other.yaml")[""][0]
    (folder / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    assert "UTF-8" in problems_of(folder / "bytes.yaml")[""][0]
    assert "cannot be read" in problems_of(folder)[""][0]


def test_no_code_runs_from_yaml(folder):
    assert (
        "is not YAML"
        in next(iter(problems_of(write(folder, "model: !!python/object/apply:os.system [ls]")).values()))[0]
    )


@pytest.mark.parametrize("in_the_file", [{}, *({"retention": x} for x in (False, True, {"budget": 1}))])
def test_an_override_below_a_key_that_is_off_or_on_makes_it_a_mapping(folder, in_the_file):
    config = load(write(folder, SMALL | in_the_file), ["retention.budget=0.3"])
    assert config.retention is not None and config.retention.budget == 0.3


def test_overrides_replace_values(folder):
    config = load(
        write(folder, SMALL),
        [
            "training.epochs=7",
            "tasks.a.alpha=1e-1",
            "tasks.b.c.data.limit=5",
            "tasks[1].metric=loss",
            "adapter.target_modules=[q_proj, v_proj]",
            "output=/elsewhere",
        ],
    )
    assert [task.training.epochs for task in config.tasks] == [7, 2]  # a task's own value stays
    assert config.tasks[0].alpha == 0.1
    assert (config.tasks[1].data.limit, config.tasks[1].metric) == (5, "loss")
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.output == Path("/elsewhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "not an override"),
        ("=3", "not an override"),
        ("training.epochs=[", "not YAML"),
        ("training.epochs=-1", "out of range"),
        ("training.epoch=1", "not a known key"),
        ("tasks.nlu.alpha=1", "no such entry"),
        ("tasks[7].alpha=1", "no such entry"),
        ("model.name=1", "has no keys"),
        ("training..epochs=1", "not a path of keys"),
    ],
)
def test_a_wrong_override_is_reported_as_an_override(folder, override, message):
    with pytest.raises(ConfigError) as caught:
        load(write(folder, SMALL), [override])
    (problem,) = caught.value.problems
    assert problem.file == "--set"
    assert message in problem.message
    assert problem.remedy


def test_a_draft_keeps_the_valid_values(folder):
    content = changed(adapter={"rank": -1, "sparsity": 0.5}, tasks__0__training={"epochs": "x", "batch_size": 3})
    content["tasks"].append({"name": "broken"})
    config, problems = draft(write(folder, content))
    assert {p.field for p in problems} == {"adapter.rank", "tasks[0].training.epochs", "tasks[2].data"}
    assert [task.name for task in config.tasks] == ["a", "b.c"]
    assert (config.adapter.rank, config.adapter.sparsity) == (64, 0.5)
    assert config.tasks[0].training.batch_size == 3


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


FULL = yaml.safe_load(WHOLE_FILE)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.just({"file": 3, "x": [1]}),
    st.just([None, {"name": "a"}, 4]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([p for p in places(FULL) if p]), JUNK), min_size=1, max_size=4))
def test_junk_anywhere_becomes_problems_and_never_an_exception(folder, changes):
    content = copy.deepcopy(FULL)
    for path, junk in changes:
        place = content
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
    path = write(folder, content)
    config, problems = draft(path)
    assert config is not None or problems
    for problem in problems:
        assert problem.message and problem.remedy and problem.file and problem.field


@pytest.mark.parametrize(("in_the_file", "override"), [({"retention": None}, ()), ({}, ("retention=",))])
def test_retention_without_a_value_is_not_off(folder, in_the_file, override):
    with pytest.raises(ConfigError, match="retention: is empty, which says neither on nor off → use off, or a mapping"):
        load(write(folder, SMALL | in_the_file), override)
    assert load(write(folder, SMALL), ["retention=off"]).retention is None
