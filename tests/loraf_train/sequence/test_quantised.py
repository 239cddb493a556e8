"""A base in four bits: trained for real, and told by everything that looks at the checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import delta_weight
from loraf.errors import ConfigError
from loraf.tasksets import TaskSet
from loraf_train.adapter import quantised
from loraf_train.adapter.merging import merger_of
from loraf_train.adapter.trainable_base import TrainableBase, attached, find_targets, projections
from loraf_train.adapter.weights import weight_of
from loraf_train.sequence import runner
from loraf_train.sequence.conflicts import conflicts
from loraf_train.settings.parts import RetentionConfig
from tests.loraf_train import toys
from tests.loraf_train.command_line import TASKS, write_data
from tests.loraf_train.command_line import run as command
from tests.loraf_train.interruptions import Stopped, Stopper, contents, data
from tests.standins import make_model

pytest.importorskip("bitsandbytes")
if quantised.machine_problem("", torch.device("cpu")) is not None:
    pytest.skip("bitsandbytes does not compute on this CPU", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


def config(folder, output, **settings):
    training = {"max_steps": 6, "dropout": 0.2, "save_seconds": 0.0}
    tasks = [toys.task(name, training=training) for name in ("one", "two")]
    settings = {"quantization": "bnb-4bit", "retention": RetentionConfig(budget=0.05)} | settings
    return toys.run_config(folder, output, *tasks, **settings)


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    return runner.load_model(config(folder, tmp_path_factory.mktemp("nothing") / "ckpt"))


@pytest.fixture(scope="module")
def whole(folder, loaded, tmp_path_factory):
    run = config(folder, tmp_path_factory.mktemp("whole") / "ckpt")
    runner.run(run, data(), None, loaded)
    return run


def plain_copy(folder, model, targets):
    """The model in float32 with the weights that four bits stand for."""
    plain = toys.load(folder)
    for name, module in model.named_modules():
        if quantised.is_quantised(module):
            plain.get_submodule(name.removesuffix(".base")).weight.data.copy_(weight_of(module))
    return plain


def test_the_base_is_in_four_bits_and_loses_little(folder, loaded):
    model = loaded[0]
    layer, original = model.model.layers[0].mlp.down_proj, toys.load(folder).model.layers[0].mlp.down_proj
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == original.weight.numel() // 2
    distance = (weight_of(layer) - original.weight).norm() / original.weight.norm()
    assert 0.01 < distance < 0.2


def test_outputs_and_gradients_are_those_of_the_unpacked_weights(folder, loaded, tmp_path):
    """Compared with a plain model that holds the unpacked weights."""
    model = loaded[0]
    plain, checkpoint = toys.trainable_base(folder, tmp_path / "ckpt", dtype=torch.float32, old=(16, 0.75))
    targets = find_targets(model, ("q_proj", "v_proj", "down_proj"))
    base = TrainableBase(model, targets, projections(checkpoint, targets), toys.PAD)
    same = plain_copy(folder, model, targets)
    plain = TrainableBase(same, {n: same.get_submodule(n) for n in targets}, plain.projections, toys.PAD)
    batch = toys.batch(toys.examples(3, 4))
    results = []
    for one in (base, plain):
        from loraf_train.adapter.trainable_base import earlier_tasks

        positions = {name: torch.arange(3, 60) for name in targets}
        layers = one.layers(positions, 2.0, {name: earlier_tasks(checkpoint, ["old"], name) for name in targets})
        with attached(one.model, layers):
            outputs = one.model(**batch)
            outputs.loss.backward()
        results.append((outputs.logits, {name: layer.values.grad for name, layer in layers.items()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-3)


def test_sets_are_applied_beside_the_weights_as_they_would_be_merged(folder, loaded, whole):
    checkpoint, model = Checkpoint.open(whole.output), loaded[0]
    targets = find_targets(model, ("q_proj", "v_proj", "down_proj"))
    ids = toys.batch(toys.examples(3, 4))["input_ids"]
    before, merger = model(ids).logits, merger_of(model, checkpoint)
    for chosen in (TaskSet.of({"one": 1.0, "two": 0.5}, ("one", "two")), TaskSet.of({"two": 1.0}, ("one", "two"))):
        merger.merge(chosen)
        plain = plain_copy(folder, model, targets)
        for name in checkpoint.manifest.modules:
            plain.get_submodule(name).weight.data += delta_weight(checkpoint, name, chosen, None, torch.float32)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    merger.merge(TaskSet())
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("at", [("one", "step 3"), ("two", "calibration 1")], ids="-".join)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(folder, loaded, whole, tmp_path, at):
    again = config(folder, tmp_path / "ckpt")
    with pytest.raises(Stopped):
        runner.run(again, data(), Stopper(*at), loaded)
    runner.run(again, data(), Stopper(), loaded)
    assert contents(again.output) == contents(whole.output)


def test_the_manifest_records_it_and_another_base_does_not_continue_it(folder, whole):
    manifest = Checkpoint.open(whole.output).manifest
    assert [task.training["settings"]["quantization"] for task in manifest.tasks] == ["bnb-4bit"] * 2
    assert all(task.statistics is not None for task in manifest.tasks)
    other = whole.model_copy(update={"quantization": None})
    shapes = {name: (module.d_out, module.d_in) for name, module in manifest.modules.items()}
    problems = [p for p in conflicts(other, manifest, folder, shapes) if p.field == "quantization"]
    assert len(problems) == 2 and "trained with 'bnb-4bit', but the file says none" in problems[0].message
    assert not [p for p in conflicts(whole, manifest, folder, shapes) if p.field == "quantization"]


def test_a_machine_that_cannot_is_refused(folder, tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", broken)
    with pytest.raises(ConfigError, match="no such kernel.*loraf\\[bnb\\]"):
        runner.load_model(config(folder, tmp_path / "ckpt"))


def test_the_commands(tmp_path, monkeypatch, capsys):
    make_model("llama", tmp_path / "base")
    write_data(tmp_path)
    (tmp_path / "tasks.yaml").write_text(TASKS + "quantization: bnb-4bit\n")
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, "check", "tasks.yaml")
    assert status == 0 and "in four bits (bnb-4bit)" in out, err
    status, out, err = command(capsys, "run", "tasks.yaml")
    assert status == 0 and "score of each task" in out, err
    status, out, err = command(capsys, "eval", "tasks.yaml", "--tasks", "upper", "--json", "scores.json")
    assert status == 0 and json.loads((tmp_path / "scores.json").read_text())["quantization"] == "bnb-4bit", err
    status, out, err = command(capsys, "inspect", "ckpt")
    assert status == 0 and "trained on the base in four bits (bnb-4bit)" in out, err
    status, out, err = command(capsys, "export", "ckpt", "--tasks", "upper", "--format", "merged", "--out", "merged")
    assert status == 2 and "four bits" in err and "--format peft" in err, out
    status, out, err = command(capsys, "export", "ckpt", "--tasks", "upper", "--format", "peft", "--out", "lora")
    assert status == 0 and "trained on the base in four bits (bnb-4bit)" in out, err
