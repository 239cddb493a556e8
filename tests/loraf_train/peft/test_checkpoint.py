"""`save_pretrained` writes the checkpoint of `loraf-train`, which every other part of the project reads."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, UnknownTask
from loraf.tasksets import TaskSet
from loraf_train import card
from loraf_train.adapter.trainable_base import find_targets, projections
from loraf_train.cli import main
from loraf_train.peft import calibrate, finish_task, load_tasks, next_task, select_tasks
from loraf_train.peft.model import tuner_of
from tests.loraf_train.peft import toys


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """A model with two trained tasks, and the folder that it was saved to."""
    model = toys.trained(folder, dtype="bfloat16")
    out = tmp_path_factory.mktemp("saved") / "out"
    model.save_pretrained(out)
    first = (out / "tasks/one.safetensors").read_bytes()
    next_task(model, toys.config("two", dtype="bfloat16"))
    calibrate(model, toys.batches(50), steps=2, learning_rate=1e-2)
    toys.loop(model, toys.batches(50))
    finish_task(model)
    model.save_pretrained(out)
    assert (out / "tasks/one.safetensors").read_bytes() == first
    return model, out


def test_the_manifest_says_what_the_configuration_said(saved):
    manifest = Checkpoint.open(saved[1]).manifest
    assert (manifest.rank, manifest.projection.seed, manifest.task_names) == (8, 0, ("one", "two"))
    one, two = manifest.tasks
    assert (one.alpha, one.sparsity, one.dtype, one.trained_with) == (16, 0.75, "bfloat16", ())
    assert (two.trained_with, two.training["calibration"]["steps"]) == (("one",), 2)
    assert set(two.training["retention"]["spent"]) == {"one"}
    assert one.statistics is not None and two.statistics is not None


def test_inspect_verifies_it(saved, capsys):
    assert main(["inspect", str(saved[1]), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out


def test_merged_into_the_base_it_answers_as_the_model_does(folder, saved):
    """By the code that the server merges with."""
    model, out = saved
    checkpoint, plain = Checkpoint.open(out), toys.base(folder)
    for name, task_set in {"default": {"one": 1.0}, "two": {"one": 1.0, "two": 1.0}}.items():
        model.set_adapter(name)
        merger = Merger(plain, checkpoint)
        merger.merge(TaskSet.of(task_set, ["one", "two"]))
        torch.testing.assert_close(toys.logits(plain), toys.logits(model), rtol=1e-4, atol=1e-5)
        merger.merge(TaskSet())


def test_A_is_the_checkpoint_s(saved):
    model, out = saved
    checkpoint = Checkpoint.open(out)
    for name, layer in tuner_of(model).layers().items():
        assert torch.equal(layer.loraf_a, checkpoint.projection_of(name))


def test_load_tasks_gives_it_back(folder, saved):
    model, out = saved
    loaded = load_tasks(toys.base(folder), out)
    model.set_adapter("two")
    assert loaded.active_adapters == ["two"]
    assert torch.equal(toys.logits(loaded), toys.logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.set_adapter("one")
    model.set_adapter("default")
    assert torch.equal(toys.logits(loaded), toys.logits(model))


def test_some_tasks_come_with_those_they_were_trained_on(folder, saved):
    assert list(load_tasks(toys.base(folder), saved[1], ["two"]).peft_config) == ["one", "two"]
    assert list(load_tasks(toys.base(folder), saved[1], ["one"]).peft_config) == ["one"]
    with pytest.raises(UnknownTask):
        load_tasks(toys.base(folder), saved[1], ["three"])


def test_peft_loads_its_own_files(folder, saved):
    model, out = saved
    loaded = PeftModel.from_pretrained(toys.base(folder), out)
    model.set_adapter("default")
    assert torch.equal(toys.logits(loaded), toys.logits(model))
    loaded.load_adapter(out / "two", "two")
    loaded.set_adapter("two")
    model.set_adapter("two")
    assert torch.equal(toys.logits(loaded), toys.logits(model))


def test_a_task_without_those_it_stands_on_is_refused(folder, saved):
    with pytest.raises(ConfigError, match=r"trained on top of one, which the model does not have.*load_tasks"):
        PeftModel.from_pretrained(toys.base(folder), saved[1] / "two")
    model = toys.adapted(folder, name="three")
    with pytest.raises(ConfigError, match="trained on top of one"):
        model.load_adapter(saved[1] / "two", "two")
    assert list(tuner_of(model).states) == list(model.peft_config) == ["default"]
    assert not any(".two." in name for name, _ in model.named_parameters())


def test_a_loaded_checkpoint_is_trained_on_and_saved_where_it_was(folder, saved, tmp_path):
    out = shutil.copytree(saved[1], tmp_path / "out")
    model = load_tasks(toys.base(folder), out)
    before = {file.name: file.read_bytes() for file in (out / "tasks").iterdir()}
    next_task(model, toys.config("three"))
    assert len(tuner_of(model).finished()) == 2
    calibrate(model, toys.batches(90), steps=2, learning_rate=1e-2)
    toys.loop(model, toys.batches(90))
    model.save_pretrained(out)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.manifest.task("three").trained_with == ("one", "two")
    assert {name: (out / "tasks" / name).read_bytes() for name in before} == before


def test_sets_are_taken_literally(folder, saved):
    model, out = saved
    checkpoint, plain = Checkpoint.open(out), toys.base(folder)
    merger = Merger(plain, checkpoint)
    for text in ("two", "one+two:0.5", "all", "base", "as_trained=two", "one:-1"):
        from loraf.set_text import task_set

        merger.merge(task_set(text, checkpoint.manifest))
        select_tasks(model, text)
        torch.testing.assert_close(toys.logits(model), toys.logits(plain), rtol=1e-4, atol=1e-5)
    select_tasks(model, None)
    with pytest.raises(UnknownTask, match="there is no task 'three'"):
        select_tasks(model, "three")


def test_several_active_adapters_are_their_union(saved):
    model, _ = saved
    model.base_model.set_adapter(["default", "two"])
    both = toys.logits(model)
    model.set_adapter("two")
    torch.testing.assert_close(both, toys.logits(model), rtol=1e-5, atol=1e-6)


def test_a_task_in_training_is_saved_as_if_it_ended_and_replaced_by_the_next_save(folder, tmp_path):
    model = toys.trained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    first = Checkpoint.open(tmp_path).manifest.adapter_digest
    model.save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).manifest.adapter_digest == first
    toys.loop(model, toys.batches(3))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.manifest.adapter_digest != first
    for name, own in toys.values(model).items():
        assert torch.equal(checkpoint.tasks["one"][name].values, own.bfloat16())


def test_a_task_of_somebody_else_is_never_replaced(folder, tmp_path):
    toys.trained(folder).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a task 'one' with other values, which is never written again"):
        toys.trained(folder, steps=2).save_pretrained(tmp_path)


def test_a_folder_with_another_checkpoint_is_refused(folder, saved, tmp_path):
    out = shutil.copytree(saved[1], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"(?s)rank.*holds two, which the model does not have"):
        toys.trained(folder, r=16).save_pretrained(out)


def test_an_untrained_model_is_not_saved(folder, tmp_path):
    with pytest.raises(ConfigError, match="nothing to save"):
        toys.adapted(folder).save_pretrained(tmp_path)


def test_a_model_that_is_not_the_one_in_its_folder_is_not_saved(folder, tmp_path):
    """Something was merged into it: a server that loads the folder would answer otherwise."""
    model = toys.trained(folder)
    layer = next(iter(tuner_of(model).layers().values()))
    layer.linear.weight.data += 0.1
    with pytest.raises(ConfigError, match="has other values than in"):
        model.save_pretrained(tmp_path)


def test_a_model_without_a_folder_is_not_saved_and_says_so_before_it_trains(folder, tmp_path):
    model = toys.adapted(folder)
    model.get_base_model().config._name_or_path = ""
    model.get_base_model().name_or_path = ""
    with pytest.warns(UserWarning, match=r"what is trained here cannot be saved: .* made from a config"):
        calibrate(model, toys.batches(3), steps=2)
    with pytest.raises(ConfigError, match="made from a config"):
        model.save_pretrained(tmp_path)


def test_its_card_is_the_checkpoint_s_and_names_no_path(folder, tmp_path):
    """PEFT's own is an empty template, with the base's path on this machine."""
    model = toys.trained(folder)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert card.is_generated(path) and str(folder.parent) not in path.read_text()
    assert path.read_text().startswith(card.card(manifests.read(tmp_path), tmp_path.name))
    next_task(model, toys.config("two"))
    calibrate(model, toys.batches(9), steps=2)
    model.save_pretrained(tmp_path)
    assert "2 tasks" in path.read_text()


def test_a_card_of_one_s_own_keeps_its_text_and_gets_no_path(folder, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\nabout it\n")
    toys.trained(folder).save_pretrained(tmp_path)
    text = path.read_text()
    assert "license: mit" in text and "# Mine\n\nabout it" in text and str(folder.parent) not in text


@pytest.mark.parametrize(("field", "value"), [("alpha", 4), ("seed", 3), ("init_std", 0.5)])
def test_values_that_were_trained_with_something_else_are_not_loaded(folder, tmp_path, field, value):
    """Without a callback, PEFT alone loads them: on the folder's name, or as a state."""
    model = toys.trained(folder)
    model.save_pretrained(tmp_path)
    other = toys.adapted(folder, **{field: value})
    with pytest.raises(ConfigError, match=rf"{field}: the values for adapter 'default' were trained with"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(ConfigError, match=field):
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    same = toys.adapted(folder)
    same.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(toys.logits(same), toys.logits(model))


def test_values_without_what_they_were_trained_with_are_still_loaded(folder):
    state = get_peft_model_state_dict(toys.trained(folder))
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("made_with")}
    other = toys.adapted(folder)
    set_peft_model_state_dict(other, bare)
    assert tuner_of(other).is_calibrated("default")


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_of_the_base_does_not_matter(folder, tmp_path, precision):
    model = toys.adapted(folder, precision)
    calibrate(model, toys.batches(3), steps=2)
    model.save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).manifest.task_names == ("one",)


def test_another_base_is_refused(saved, tmp_path):
    from tests.standins import make_model

    other = toys.base(make_model("llama", tmp_path / "other", seed=1))
    with pytest.raises(BaseMismatch):
        load_tasks(other, saved[1])


def test_merging_and_taking_apart_again_is_exact(folder, saved):
    model, _ = saved
    model.set_adapter("two")
    before = {name: layer.linear.weight.clone() for name, layer in tuner_of(model).layers().items()}
    expected = toys.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(toys.logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(layer.linear.weight, before[name]) for name, layer in tuner_of(model).layers().items())
    assert torch.equal(toys.logits(model), expected)


def test_a_tied_head_is_merged_without_its_embedding(tmp_path):
    from tests.standins import make_model

    path = make_model("llama", tmp_path / "tied")
    plain = toys.base(path)
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    plain.save_pretrained(path)
    model = toys.trained(path, target_modules=["lm_head", "q_proj"])
    expected, embedding = toys.logits(model), model.get_input_embeddings().weight.clone()
    model.merge_adapter()
    model.save_pretrained(tmp_path / "out")
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(toys.logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not merged.config.tie_word_embeddings


def test_the_projections_are_those_of_a_run(folder, saved):
    base = toys.base(folder)
    targets = find_targets(base, toys.TARGETS)
    for name, a in projections(Checkpoint.open(saved[1]), targets).items():
        assert torch.equal(a, tuner_of(saved[0]).layers()[name].loraf_a)


@pytest.mark.parametrize("changed", ["embed_tokens.weight", "k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_base_that_was_changed_anywhere_is_neither_saved_nor_given_tasks(folder, saved, tmp_path, changed):
    model, base = toys.trained(folder), toys.base(folder)
    for one in (model, base):
        weight = [weight for name, weight in one.named_parameters() if name.endswith(changed)][-1]
        with torch.no_grad():
            weight.mul_(1.5)
    with pytest.raises(ConfigError, match=f"{changed} has other values than in"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{changed} has other values than in"):
        load_tasks(base, saved[1])
    assert load_tasks(base, saved[1], allow_other_base=True).active_adapters == ["two"]


def test_a_base_with_a_resized_vocabulary_is_not_saved(folder, saved):
    base = toys.base(folder)
    base.resize_token_embeddings(base.config.vocab_size + 8)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight of shape .* that the model in .* does not have"):
        load_tasks(base, saved[1])
