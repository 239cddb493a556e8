"""Training the active task: what is trained, what is refused, and that finished tasks are kept and protected."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from loraf import manifest as manifests
from loraf.errors import ConfigError
from loraf.manifest import positions_per_matrix
from loraf_train.adapter.dropout import keep_rate
from loraf_train.peft import calibrate, finish_task, load_tasks, next_task, protect
from loraf_train.peft.model import tuner_of
from loraf_train.peft.protect import protected
from tests.loraf_train.peft import toys


def test_only_the_values_train_and_k_of_each_matrix_are_trainable(folder, capsys):
    model = toys.adapted(folder)
    shapes = {name: (layer.out_features, 8) for name, layer in tuner_of(model).layers().items()}
    expected = sum(positions_per_matrix(0.75, *shape) for shape in shapes.values())
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"values"}


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_loop_that_trains_before_calibration_is_refused(folder, mode):
    model = toys.adapted(folder).train(mode)
    loss = model(**toys.batches(3)[0]).loss
    with pytest.raises(ConfigError, match=r"positions are not chosen yet.*calibrate"):
        loss.backward()


def test_before_calibration_the_model_computes_what_the_base_does(folder):
    assert torch.equal(toys.logits(toys.adapted(folder)), toys.logits(toys.base(folder)))


def test_training_changes_the_values_and_lowers_the_loss(folder):
    model = toys.adapted(folder)
    calibrate(model, toys.batches(3), steps=2, learning_rate=1e-2)
    assert torch.equal(toys.logits(model), toys.logits(toys.base(folder)))  # calibration is thrown away
    losses = toys.loop(model, toys.batches(3), 12)
    assert losses[-1] < losses[0] - 0.3
    assert all(bool(v.any()) for v in toys.values(model).values())


def test_calibration_goes_round_again_and_stops_after_its_steps(folder):
    seen = []
    model = toys.adapted(folder)
    calibrate(model, toys.batches(3), steps=7, on_step=lambda loss, step, total: seen.append((step, total)))
    assert seen == [(step, 7) for step in range(1, 8)]


@pytest.mark.parametrize("once", [iter, lambda batches: (batch for batch in batches)], ids=["iterator", "generator"])
def test_an_iterable_that_can_be_read_only_once_chooses_the_same(folder, once):
    model, other = toys.adapted(folder), toys.adapted(folder)
    calibrate(model, toys.batches(3), steps=7)
    calibrate(other, once(toys.batches(3)), steps=7)
    for own, same in zip(toys.positions(model).values(), toys.positions(other).values(), strict=True):
        assert torch.equal(own, same)


def test_calibration_leaves_the_mode_and_the_random_generator_alone(folder):
    model = toys.adapted(folder).eval()
    before = torch.get_rng_state()
    calibrate(model, toys.batches(3), steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "has no batches"), ([[1, 2]], "holds a list"), ([{"input_ids": torch.ones(1, 4).long()}], "no loss")],
)
def test_batches_that_cannot_be_used_are_refused(folder, data, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(toys.adapted(folder), data)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"learning_rate": math.nan}, {"optimizer": "adam"}])
def test_wrong_arguments_of_calibrate_are_refused(folder, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        calibrate(toys.adapted(folder), toys.batches(3), **bad)


def test_a_task_is_calibrated_once(folder):
    model = toys.trained(folder)
    with pytest.raises(ConfigError, match="in training"):
        calibrate(model, toys.batches(3))
    finish_task(model)
    with pytest.raises(ConfigError, match="is finished"):
        calibrate(model, toys.batches(3))


def test_calibration_with_the_adapters_off_is_refused(folder):
    model = toys.adapted(folder)
    with model.disable_adapter(), pytest.raises(ConfigError, match="switched off"):
        calibrate(model, toys.batches(3))


def test_dropout_zeroes_inputs_of_the_adapter_and_keeps_their_mean(folder):
    model = toys.trained(folder, dropout=0.5)
    layer = next(iter(tuner_of(model).layers().values()))
    x = torch.ones(2, 3, layer.in_features)
    with torch.no_grad():
        calm = layer.eval()(x) - layer.linear(x)
        drawn = torch.stack([layer.train()(x) - layer.linear(x) for _ in range(400)])
    assert (drawn[0] - drawn[1]).abs().max() > 0
    torch.testing.assert_close(drawn.mean((0, 1, 2)), calm[0, 0], rtol=0, atol=float(drawn.std() / 10))
    assert keep_rate(0.5) == 0.5


def test_bfloat16_bases_train_float32_values(folder):
    model = toys.adapted(folder, torch.bfloat16)
    calibrate(model, toys.batches(3), steps=2, learning_rate=1e-2)
    losses = toys.loop(model, toys.batches(3), 12)
    assert losses[-1] < losses[0] - 0.3
    assert {v.dtype for v in toys.values(model).values()} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_values(folder, reentrant):
    plain, saving = toys.adapted(folder), toys.adapted(folder)
    saving.enable_input_require_grads()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        calibrate(model, toys.batches(3), steps=2, learning_rate=1e-2)
        toys.loop(model, toys.batches(3))
    for name, own in toys.values(plain).items():
        assert torch.equal(own, toys.values(saving)[name])


def test_gradient_checkpointing_draws_the_same_dropout_again(folder):
    """With other masks in the second pass, gradients would not be those of the loss."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        model = toys.trained(folder, dropout=0.3)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model.train()
        model(**toys.batches(3)[0]).loss.backward()
        gradients.append([layer.task("default").values.grad for layer in tuner_of(model).layers().values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_values_that_were_cast_to_bfloat16_do_not_train(folder):
    model = toys.trained(folder)
    model.bfloat16()
    with pytest.raises(ConfigError, match="not float32 any more"):
        model(**toys.batches(3)[0]).loss.backward()


# --- the next task ----------------------------------------------------------------------------------------------


def two_tasks(folder, **fields):
    model = toys.trained(folder)
    next_task(model, toys.config("two", **fields))
    calibrate(model, toys.batches(50), steps=2, learning_rate=1e-2)
    return model


def test_masks_of_tasks_are_disjoint_and_the_first_stays_as_it_was(folder):
    model = toys.trained(folder)
    before, values = toys.logits(model), toys.values(model)
    next_task(model, toys.config("two"))
    assert model.active_adapters == ["two"]
    assert torch.equal(toys.logits(model), before)  # the new task stands on the first and has no values yet
    calibrate(model, toys.batches(50), steps=2, learning_rate=1e-2)
    toys.loop(model, toys.batches(50))
    assert not torch.equal(toys.logits(model), before)
    for name, own in toys.positions(model, "two").items():
        assert not torch.isin(own, toys.positions(model)[name]).any()
    model.set_adapter("default")
    assert torch.equal(toys.logits(model), before)
    assert all(torch.equal(values[name], v) for name, v in toys.values(model).items())
    assert not any(p.requires_grad for p in model.parameters())  # a finished task does not train again


def test_what_tasks_share_need_not_be_said_again(folder):
    from loraf_train.peft import LorafConfig

    model = toys.trained(folder, seed=7)
    next_task(model, LorafConfig(task_name="two", sparsity=0.75))
    config = model.peft_config["two"]
    assert (config.r, config.seed, config.target_modules) == (8, 7, set(toys.TARGETS))


def test_each_task_has_a_configuration_of_its_own(folder):
    model = toys.trained(folder)
    config = model.peft_config["default"]
    config.task_name = "two"
    with pytest.raises(ConfigError, match="belongs to a task of the model already"):
        next_task(model, config)


def test_peft_own_calls_make_the_same_next_task(folder):
    """add_adapter and set_adapter instead of next_task: calibration finishes the tasks before."""
    model, other = two_tasks(folder), toys.trained(folder)
    other.add_adapter("two", toys.config("two"))
    other.set_adapter("two")
    calibrate(other, toys.batches(50), steps=2, learning_rate=1e-2)
    assert tuner_of(other).finished() == ["default"]
    for name, own in toys.positions(model, "two").items():
        assert torch.equal(own, toys.positions(other, "two")[name])


def test_start_base_trains_on_the_base_alone(folder):
    model = toys.trained(folder)
    next_task(model, toys.config("two", start="base"))
    assert torch.equal(toys.logits(model), toys.logits(toys.base(folder)))


def test_values_are_rounded_to_the_stored_dtype_when_a_task_ends(folder):
    model = toys.trained(folder, dtype="bfloat16")
    finish_task(model)
    assert all(torch.equal(v, v.bfloat16().float()) for v in toys.values(model).values())


def test_training_a_later_task_without_protection_is_refused(folder):
    model = two_tasks(folder)
    with pytest.raises(ConfigError, match=r"retention: nothing keeps it from changing.*protect"):
        model(**toys.batches(50)[0]).loss.backward()


def test_protection_ends_with_its_training(folder):
    model = two_tasks(folder)
    toys.loop(model, toys.batches(50))
    with pytest.raises(ConfigError, match="retention"):
        model(**toys.batches(50)[0]).loss.backward()


def test_positions_that_come_from_a_state_need_protection_too(folder):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(two_tasks(folder), adapter_name="two")
    model = toys.trained(folder)
    next_task(model, toys.config("two"))
    set_peft_model_state_dict(model, state, adapter_name="two")
    with pytest.raises(ConfigError, match="nothing keeps it from changing"):
        model(**toys.batches(50)[0]).loss.backward()


def test_finished_tasks_without_statistics_are_named(folder, tmp_path):
    from peft import PeftModel

    toys.trained(folder).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(toys.base(folder), tmp_path)
    model.add_adapter("two", toys.config("two"))
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="finished tasks one have no statistics"):
        calibrate(model, toys.batches(50), steps=2)


def test_a_wrapped_model_is_calibrated(folder, monkeypatch):
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
    model = toys.adapted(folder)
    calibrate(Wrapped(model), toys.batches(3), steps=2)
    assert tuner_of(model).is_calibrated("default")


def test_retention_none_is_algorithm_1(folder):
    model = two_tasks(folder, retention=None)
    model(**toys.batches(50)[0]).loss.backward()


def test_retention_keeps_the_earlier_task_within_its_budget(folder):
    """The statistics' own prediction, and the measured change of the first task's logits."""
    changes = {}
    for budget in (None, 0.02):
        model = toys.trained(folder)
        before = toys.logits(model)
        next_task(model, toys.config("two", retention=budget))
        calibrate(model, toys.batches(50), steps=2, learning_rate=1e-2)
        toys.loop(model, toys.batches(50), 30)
        changes[budget] = float((toys.logits(model) - before).square().mean().sqrt())
        if budget is not None:
            assert tuner_of(model).states["two"].record["retention"]["spent"]["one"] < 0.05
    assert changes[0.02] < changes[None] / 3


def test_protection_wants_the_optimizer_of_the_training(folder):
    model = two_tasks(folder)
    with pytest.raises(ConfigError, match="does not train the values"):
        protect(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 4)


def test_scaled_gradients_are_refused_where_protection_would_drown(folder):
    model = two_tasks(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    protect(model, optimizer, 4)
    model(**toys.batches(50)[0]).loss.backward()
    optimizer.grad_scale = torch.tensor(65536.0)  # as torch.amp.GradScaler does for a fused optimizer
    with pytest.raises(ConfigError, match="scaled for float16"):
        optimizer.step()


def test_statistics_are_gathered_from_the_batches_of_calibration(folder):
    model = toys.trained(folder)
    finish_task(model)
    assert len(tuner_of(model).states["default"].examples) == 16
    assert [task.name for task in protected(tuner_of(model))] == ["one"]


def test_a_task_that_nothing_is_known_of_is_finished_with_a_warning(folder):
    model = toys.adapted(folder)
    batch = toys.batches(3)[0]
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch.pop("input_ids")).detach(), **batch}
    calibrate(model, [embedded], steps=2)
    with pytest.warns(UserWarning, match="statistics of task 'one' could not be gathered"):
        finish_task(model)


def test_tasks_that_do_not_fit_are_refused_before_anything_changes(folder):
    model = toys.trained(folder)
    with pytest.raises(ConfigError, match="positions"):
        next_task(model, toys.config("two", sparsity=0.1))
    assert list(model.peft_config) == ["default"]
    assert list(tuner_of(model).states) == ["default"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"r": 4}, "r"),
        ({"seed": 3}, "seed"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"init_std": 1.0}, "init_std"),
    ],
)
def test_tasks_of_a_model_share_the_adapter(folder, fields, field):
    model = toys.trained(folder)
    with pytest.raises(ConfigError, match=field):
        model.add_adapter("two", toys.config("two", **fields))


def test_two_tasks_of_one_name_are_refused(folder):
    with pytest.raises(ConfigError, match="has a task 'one' already"):
        toys.trained(folder).add_adapter("other", toys.config("one"))


def test_an_untrained_task_cannot_be_followed_by_another(folder):
    with pytest.raises(ConfigError, match="has not been trained"):
        next_task(toys.adapted(folder), toys.config("two"))


def masked(batch):
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("kind", ["empty", "unlabelled", "masked"])
def test_data_that_hold_nothing_to_learn_do_not_switch_protection_off(folder, kind):
    batch = toys.batches(3)[0]
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    data = {"empty": [], "unlabelled": [unlabelled], "masked": [masked(batch)]}[kind]
    model = toys.trained(folder)
    with pytest.raises(ConfigError, match="data: holds nothing that task 'one' could have learned"):
        next_task(model, toys.config("two"), data)
    assert list(model.peft_config) == ["default"]


def test_data_for_a_task_that_has_its_statistics_are_refused(folder):
    """They would change nothing."""
    model = toys.trained(folder)
    finish_task(model)
    before = tuner_of(model).states["default"].statistics
    with pytest.raises(ConfigError, match="data: task 'one' is finished, with the statistics"):
        next_task(model, toys.config("two"), toys.batches(3))
    assert list(model.peft_config) == ["default"] and tuner_of(model).states["default"].statistics == before
    finish_task(model)  # idempotent without
    model = toys.trained(folder, retention=None)
    with pytest.raises(ConfigError, match="data: nothing protects task 'one', whose retention is None"):
        finish_task(model, toys.batches(3))


def test_data_give_a_finished_task_without_statistics_what_protects_it(folder, tmp_path):
    model = toys.trained(folder)
    finish_task(model, toys.batches(3))
    expected = tuner_of(model).states["default"].statistics
    model.save_pretrained(tmp_path)
    manifest = manifests.read(tmp_path).without_statistics()
    (tmp_path / "loraf.json").write_text(manifest.to_json())
    shutil.rmtree(tmp_path / "statistics")
    loaded = load_tasks(toys.base(folder), tmp_path)
    assert tuner_of(loaded).states["one"].statistics is None
    next_task(loaded, toys.config("two"), toys.batches(3))
    assert tuner_of(loaded).states["one"].statistics == expected
    calibrate(loaded, toys.batches(50), steps=2)
    with pytest.raises(ConfigError, match="nothing keeps it from changing"):
        loaded.train()(**toys.batches(50)[0]).loss.backward()


def test_calibration_without_labels_says_so(folder):
    with pytest.raises(ConfigError, match="no label to learn"):
        calibrate(toys.adapted(folder), [masked(toys.batches(3)[0])], steps=1)


def test_training_with_a_set_selected_is_refused(folder):
    from loraf_train.peft import select_tasks

    model = toys.trained(folder).train()
    select_tasks(model, "base")
    with pytest.raises(ConfigError, match=r"task set is selected.*select_tasks\(model, None\)"):
        model(**toys.batches(3)[0])
    select_tasks(model, None)
    model(**toys.batches(3)[0]).loss.backward()


@pytest.mark.parametrize("given", [{"r": 64}, {"seed": 0}])
def test_a_default_that_was_given_is_not_replaced(folder, given):
    from loraf_train.peft import LorafConfig

    model = toys.trained(folder, seed=5)
    (field,) = given
    with pytest.raises(ConfigError, match=rf"{field}: is {given[field]}, but the model's first task has"):
        next_task(model, LorafConfig(task_name="two", sparsity=0.75, **given))


def test_a_training_shorter_than_its_protection_is_reported(folder):
    model = two_tasks(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    guard = protect(model, optimizer, steps=1000)
    model.train()(**toys.batches(50)[0]).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="protected for 1000 steps and trained for 1"):
        guard.remove()
