"""`loraf-train compare`: what it prints and writes, and that it reports every mistake before anything is trained."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml

from loraf.errors import ConfigError
from loraf_train.commands import compare
from loraf_train.compare.results import Results
from loraf_train.settings.comparison import METHODS
from loraf_train.settings.loading import load
from loraf_train.terminal.tables import console
from tests.loraf_train import toys
from tests.loraf_train.command_line import run
from tests.loraf_train.compare_toys import FILE, SHORT, write_data
from tests.standins import make_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def folder(base_folder, tmp_path, monkeypatch) -> Path:
    (tmp_path / "base").symlink_to(base_folder)
    write_data(tmp_path)
    (tmp_path / "tasks.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(folder: Path, **section) -> dict[str, tuple[str, str]]:
    content = yaml.safe_load((folder / "tasks.yaml").read_text()) | {"compare": section}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load(folder / "tasks.yaml")
    return {p.field: (p.message, p.remedy) for p in caught.value.problems}


# --- settings ---------------------------------------------------------------------------------------------------


def test_a_methods_settings_override_those_of_the_task(folder):
    content = yaml.safe_load(FILE)
    content["tasks"][1] |= {"training": {"learning_rate": 1e-3, "epochs": 4}, "alpha": 5}
    content["compare"]["methods"] = {
        "lora": {
            "rank": 16,
            "training": {"learning_rate": 1e-4},
            "tasks": {"truth": {"training": {"learning_rate": 5e-4, "weight_decay": 0.1}, "alpha": 7}},
        },
        "loraf": {"sparsity": 0.7, "training": {"learning_rate": 3e-3}},
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    config = load(folder / "tasks.yaml")
    lora, loraf, full = (config.of_method(name) for name in ("lora", "loraf", "full"))
    assert (lora.adapter.rank, config.adapter.rank, loraf.adapter.rank) == (16, 8, 8)
    upper, truth = lora.tasks
    assert (upper.training.learning_rate, upper.alpha) == (1e-4, 16)  # α defaults to the rank
    assert (truth.training.learning_rate, truth.training.weight_decay, truth.training.epochs) == (5e-4, 0.1, 4)
    assert (truth.alpha, config.tasks[1].alpha) == (7, 5)
    assert [task.sparsity for task in loraf.tasks] == [0.7, 0.7]
    assert [task.calibration.learning_rate for task in loraf.tasks] == [3e-3, 3e-3]  # follows the training's
    assert full.tasks == config.tasks and full.tasks[1].training.learning_rate == 1e-3
    assert config.compare.seeds == (3, 4)


def test_all_mistakes_of_the_section_are_reported_at_once(folder):
    problems = problems_of(
        folder,
        seeds=[1, 1],
        general="nowhere.jsonl",
        sedes=3,
        methods={
            "lora": {"training": {"lerning_rate": 1e-3, "max_length": 3}, "sparsity": 0.5, "tasks": {"maths": {}}},
            "qlora": {},
            "full": {"rank": 3, "alpha": 2, "training": {"dropout": 0.1}, "tasks": {"upper": {"calibration": {}}}},
            "random-mask": {"rank": 0},
        },
    )
    expected = {
        "compare.seeds": "listed twice",
        "compare.general": "there is no file",
        "compare.sedes": "not a known key",
        "compare.methods.lora.training.lerning_rate": "not a known key",
        "compare.methods.lora.training.max_length": "the same for all methods",
        "compare.methods.lora.sparsity": "the method lora has no sparsity",
        "compare.methods.lora.tasks.maths": "there is no task 'maths'",
        "compare.methods.qlora": "'qlora' is not known",
        "compare.methods.full.rank": "the method full has no rank",
        "compare.methods.full.alpha": "the method full has no alpha",
        "compare.methods.full.training.dropout": "the method full has no dropout",
        "compare.methods.full.tasks.upper.calibration": "the method full has no calibration",
        "compare.methods.random-mask.rank": "out of range",
    }
    assert problems.keys() == expected.keys()
    for field, part in expected.items():
        message, remedy = problems[field]
        assert part in message and remedy, field
    assert problems["compare.sedes"][1] == "did you mean 'seeds'?"
    assert problems["compare.methods.lora.tasks.maths"][1] == "choose from: upper, truth"
    assert all(name in problems["compare.methods.qlora"][1] for name in METHODS)


def test_strengths_and_orders_that_mean_nothing_are_refused(folder):
    problems = problems_of(
        folder,
        orders=[["upper", "truth"], ["upper"], ["upper", "upper"], ["upper", "maths"]],
        methods={
            "lora": {"strength": 1},
            "lora-decay": {"training": {"weight_decay": 0.1}},
            "replay": {"strength": 1.5},
            "ewc": {"strength": -1, "sparsity": 0.5},
        },
    )
    expected = {
        **{f"compare.orders[{i}]": "not an order of all tasks" for i in (1, 2, 3)},
        "compare.methods.lora.strength": "the method lora has no strength",
        "compare.methods.lora-decay.training.weight_decay": "is this method's strength",
        "compare.methods.replay.strength": "is a share above 1",
        "compare.methods.ewc.strength": "out of range",
    }
    for field, part in expected.items():
        message, remedy = problems[field]
        assert part in message and remedy, field
    assert problems["compare.orders[1]"][1] == "name each of these once: upper, truth"


def test_a_strength_and_the_order_of_a_seed(folder):
    content = yaml.safe_load(FILE)
    content["compare"] |= {"orders": [["upper", "truth"], ["truth", "upper"]]}
    content["compare"]["methods"]["ewc"] = {"strength": 5}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    compare = load(folder / "tasks.yaml").of_method("ewc").compare
    assert [compare.strength(name) for name in ("ewc", "o-lora", "lora-decay", "replay")] == [5, 0.5, 0.3, 0.02]
    orders = [compare.order(seed, ("upper", "truth")) for seed in range(4)]
    assert orders == [("upper", "truth"), ("truth", "upper")] * 2


def test_a_file_without_the_section_has_its_defaults(folder):
    content = yaml.safe_load(FILE)
    del content["compare"]
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    config = load(folder / "tasks.yaml")
    assert config.compare.seeds == (0, 1, 2) and config.compare.general is None
    assert config.of_method("lora") is config


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch) -> list[Results]:
    """Collects the results that the command would print and write."""
    collected = []
    monkeypatch.setattr(compare, "_show", lambda results, folder, out: collected.append(results))
    return collected


def test_the_command_measures_and_prints_progress(folder, capsys, shown):
    arguments = ["compare", "tasks.yaml", "--protocol", "sequence", "--methods", "full,random-mask", "--set", *SHORT]
    status, out, err = run(capsys, *arguments, "--seeds", "5", "--eval-limit", "4")
    assert status == 0, err
    (results,) = shown
    assert (results.protocol, results.methods) == ("sequence", ("full", "random-mask"))
    assert [run.seed for run in results.runs] == [5, 5]
    assert [(task.name, task.metric, task.evaluations) for task in results.tasks] == [
        ("upper", "exact_match", {"upper": 4}),
        ("truth", "choice", {"one": 4, "two": 3}),
    ]
    assert all(task.higher_is_better for task in results.tasks)
    assert results.settings["full"]["upper"]["training"]["learning_rate"] == 5e-3
    assert results.settings["random-mask"]["truth"]["sparsity"] == 0.6
    assert results.surroundings["precision"] == "float32" and "torch" in results.surroundings["versions"]
    assert results.parameters == results.runs[0].costs[0].trainable
    kept = folder / "ckpt-compare" / "sequence" / "runs"
    assert sorted(file.name for file in kept.iterdir()) == ["base.json", "full-seed5.json", "random-mask-seed5.json"]
    assert "full, seed 5: upper: training step: 2 of 2" in out
    assert "random-mask, seed 5: scoring truth as trained" in out
    assert not (folder / "ckpt").exists()

    status, out, err = run(capsys, *arguments, "--seeds", "5", "--eval-limit", "4")
    assert status == 0 and shown[1] == results
    assert "full, seed 5: measured before" in out and "training step" not in out

    more = [*arguments[:4], "--methods", "full,random-mask,lora", *arguments[6:], "--seeds", "5,6", "--eval-limit", "4"]
    status, out, err = run(capsys, *more, "--stored")
    assert status == 0 and shown[2] == results
    assert "lora, seed 5: missing" in out and "full, seed 6: missing" in out and "training step" not in out
    status, out, err = run(capsys, *more, "--stored", "--out", "nothing")
    assert status == 2 and "nothing: holds none of these runs" in err and "training step" not in out


def test_results_are_printed_written_and_drawn(tmp_path, monkeypatch):
    """Tables, file and pictures are made from the results, in the folder of the results."""
    calls = []
    results = Results("single", "tiny", 1, (), ())
    tables, pictures = types.ModuleType("tables"), types.ModuleType("pictures")
    tables.show = lambda results, out: calls.append(("show", results))
    tables.markdown = lambda results: f"# {results.model} ⟂\n"
    pictures.draw = lambda results, folder: [folder / "bars.png"]
    for name, module in {"tables": tables, "pictures": pictures}.items():
        monkeypatch.setitem(sys.modules, f"loraf_train.compare.report.{name}", module)
    monkeypatch.setattr("loraf_train.compare.results.write", lambda path, results: calls.append((path.name, results)))
    out = io.StringIO()
    compare._show(results, tmp_path, console(out))
    assert calls == [("show", results), ("results.json", results)]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "# tiny ⟂\n"
    assert out.getvalue().splitlines() == [
        f"written: {tmp_path / name}" for name in ("results.json", "report.md", "bars.png")
    ]


def test_the_output_folder_may_hold_any_checkpoint(folder, capsys, shown):
    """The comparison does not read it."""
    (folder / "ckpt").mkdir()
    (folder / "ckpt" / "loraf.json").write_text("no checkpoint")
    options = ["--methods", "full", "--seeds", "0", "--out", "elsewhere", "--set", SHORT[0]]
    status, _, err = run(capsys, "compare", "tasks.yaml", "--protocol", "single", *options)
    assert status == 0, err
    assert (folder / "elsewhere" / "runs" / "full-seed0.json").exists()


def test_all_mistakes_are_reported_at_once_and_nothing_is_trained(folder, capsys, monkeypatch, shown):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("peft", "scipy") else find_spec(name)
    )
    content = yaml.safe_load(FILE)
    del content["tasks"][0]["data"]["eval"]
    content["tasks"][1]["sparsity"] = 0.5  # 0.4 and 0.5 of all positions fit
    content["compare"]["methods"]["random-mask"] = {"sparsity": 0.4}  # twice 0.6 does not
    (folder / "general.jsonl").write_text('{"text": 3}\n')
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    options = ["--methods", "loraf,dora,random-mask,lora", "--seeds", "1,x"]
    status, out, err = run(capsys, "compare", "tasks.yaml", "--protocol", "sequence", *options)
    assert status == 2 and not shown and "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 8, err
    for part in (
        "--methods: there is no method 'dora' → choose from: loraf, loraf-paper, random-mask, frozen-a, lora, ",
        "--seeds: 'x' is not a seed",
        "the package 'peft', needed for the method lora, is not installed → `pip install 'loraf[compare]'`",
        "the package 'scipy', needed for the intervals, is not installed",
        "accelerate launch: fsdp_version: compare does not train a sharded model",
        "tasks[0].data.eval: task 'upper' has no evaluation records",
        "tasks[1].sparsity: method random-mask: task 'truth' needs",
        "general.jsonl: record 1: field 'text' is missing",
    ):
        assert any(part in line for line in lines), part
    assert not (folder / "ckpt-compare").exists()


def test_a_package_is_required_only_if_it_is_needed(folder, capsys, monkeypatch, shown):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    options = ["--methods", "full", "--seeds", "0", "--set", SHORT[0]]
    status, _, err = run(capsys, "compare", "tasks.yaml", "--protocol", "single", *options)
    assert status == 0, err


def test_one_lora_for_all_tasks_has_one_alpha(folder, capsys, shown):
    content = yaml.safe_load(FILE)
    content["tasks"][0]["alpha"] = 5
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    options = ["--methods", "joint,ewc,replay,lora", "--seeds", "0", "--set", SHORT[0], "--protocol", "sequence"]
    options += ["--set", "compare.methods.replay.alpha=4"]
    status, _, err = run(capsys, "compare", "tasks.yaml", *options)
    assert status == 2 and not shown
    assert "compare.methods.joint.alpha: method joint: one LoRA serves all tasks" in err
    assert "compare.methods.ewc.alpha: " in err and "replay" not in err and "Traceback" not in err


def test_tasks_trained_alone_share_no_capacity(folder, capsys, shown):
    """Each of them has all of B."""
    options = ["--methods", "random-mask", "--seeds", "0", "--set", SHORT[0], "--set", "adapter.sparsity=0.3"]
    status, _, err = run(capsys, "compare", "tasks.yaml", "--protocol", "single", *options)
    assert status == 0, err
    status, _, err = run(capsys, "compare", "tasks.yaml", "--protocol", "sequence", *options)
    assert status == 2 and "needs" in err


# --- the example ------------------------------------------------------------------------------------------------


def test_the_examples_data_and_configuration(tmp_path):
    example = ROOT / "examples" / "compare"
    spec = importlib.util.spec_from_file_location("compare_data", example / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.main(["--out", str(tmp_path / "data")])
    shutil.copy(example / "tasks.yaml", tmp_path)
    config = load(tmp_path / "tasks.yaml")
    assert set(config.methods) == {"loraf", "random-mask", "frozen-a", "lora", "full"}  # each has its own rate
    assert len(config.compare.seeds) >= 3
    assert sum(1 - task.sparsity for task in config.of_method("loraf").tasks) <= 1

    def prompts(name: str) -> list[str]:
        return [json.loads(line)["prompt"] for line in (tmp_path / "data" / name).read_text().splitlines()]

    for task in config.tasks:
        parts = [prompts(f"{task.name}.{split}.jsonl") for split in ("train", "dev", "eval")]
        assert [len(part) for part in parts] == list(make_data.SPLITS.values())
        everything = [prompt for part in parts for prompt in part]
        assert len(set(everything)) == len(everything)
        assert {source.file.name for source in task.data.eval.values()} == {f"{task.name}.eval.jsonl"}
    general = prompts(config.compare.general.file.name)
    assert len(set(general)) == len(general) == make_data.OF_EACH_SKILL * len(make_data.tiny.SKILLS)


def test_settings_that_only_run_keeps_to_are_refused(tmp_path):
    training = {"early_stopping": {"patience": 1}}
    tasks = [
        toys.task("one", training=training),
        toys.task("two", data={"streaming": True}),
        toys.task("three", objective="dpo"),
    ]
    config = toys.run_config(tmp_path, tmp_path / "ckpt", *tasks, quantization="bnb-4bit")
    fields = ["quantization", "tasks[0].training.early_stopping", "tasks[1].data.streaming", "tasks[2].objective"]
    assert [problem.field for problem in compare._unsupported(config)] == fields
