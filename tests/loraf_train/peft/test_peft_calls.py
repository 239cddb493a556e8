"""PEFT's own calls, as its tests of a method check them (tests/testing_common.py there)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer

from loraf.errors import ConfigError
from loraf_train.peft import calibrate, finish_task, select_tasks
from loraf_train.peft.model import tuner_of
from tests.loraf_train import toys as training_toys
from tests.loraf_train.peft import toys

BATCH = training_toys.batch(training_toys.examples(3, 4))
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def several(folder, **fields):
    """Two independent tasks as adapters, `one` in `default`."""
    model = toys.trained(folder)
    model.add_adapter("two", toys.config("two", start="base", **fields))
    model.set_adapter("two")
    calibrate(model, toys.batches(50), steps=2, learning_rate=1e-2)
    toys.loop(model, toys.batches(50))
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_save_and_load(folder, tmp_path, safe):
    model = toys.trained(folder)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    suffix = "safetensors" if safe else "bin"
    assert {"adapter_config.json", f"adapter_model.{suffix}", "README.md"} <= {f.name for f in tmp_path.iterdir()}
    loaded = PeftModel.from_pretrained(toys.base(folder), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_loaded_adapter_may_train_on(folder, tmp_path):
    model = toys.trained(folder)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toys.base(folder), tmp_path, is_trainable=True)
    for one in (model, loaded):
        toys.loop(one, toys.batches(3))
    assert all(torch.equal(v, toys.values(loaded)[name]) for name, v in toys.values(model).items())


def test_what_is_loaded_for_use_is_rounded_as_it_is_served(folder, tmp_path):
    model = toys.trained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toys.base(folder), tmp_path)
    assert all(torch.equal(v, v.bfloat16().float()) for v in toys.values(loaded).values())


def test_auto_classes_find_the_base(folder, tmp_path):
    model = toys.trained(folder, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(toys.logits(loaded), toys.logits(model))


@pytest.mark.parametrize("low", [True, False])
def test_low_memory_loading(folder, tmp_path, low):
    model = several(folder)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toys.base(folder), tmp_path, low_cpu_mem_usage=low)
    loaded.load_adapter(tmp_path / "two", "two", low_cpu_mem_usage=low)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.set_adapter("two")
    assert torch.equal(toys.logits(loaded), toys.logits(model))


def test_saving_some_adapters(folder, tmp_path):
    model = several(folder)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "two/adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["three"])


def test_state_dicts_go_out_and_in(folder):
    model, other = toys.trained(folder), toys.adapted(folder)
    state = get_peft_model_state_dict(model)
    assert {name.rsplit(".", 1)[-1] for name in state} == {"values", "positions", "made_with"}
    assert not any("default" in name for name in state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(toys.logits(other), toys.logits(model))
    toys.loop(other, toys.batches(3))  # its positions are known, so it can be trained


@pytest.mark.parametrize("change", [lambda p: p.flip(0), lambda p: p + 10**6], ids=["unsorted", "outside"])
def test_impossible_positions_are_refused(folder, change):
    state = get_peft_model_state_dict(toys.trained(folder))
    name = next(name for name in state if name.endswith("positions"))
    with pytest.raises(ConfigError, match="not ascending positions"):
        set_peft_model_state_dict(toys.adapted(folder), state | {name: change(state[name])})


def test_merge_and_unload_leaves_a_plain_model(folder):
    model = toys.trained(folder)
    expected = toys.logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(toys.logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_are_merged_and_are_not_added_twice(folder):
    model = several(folder)
    select_tasks(model, "one+two")
    both = toys.logits(model)
    select_tasks(model, None)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["default", "two"])
    torch.testing.assert_close(toys.logits(model), both, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["default", "two"])
    torch.testing.assert_close(toys.logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_chosen_set_is_what_is_merged(folder):
    model = several(folder)
    select_tasks(model, "one:0.5+two")
    expected = toys.logits(model)
    torch.testing.assert_close(toys.logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_broken_adapter_is_not_merged_safely(folder):
    model = toys.trained(folder)
    layer = next(iter(tuner_of(model).layers().values()))
    layer.task("default").values.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)


def test_unload_gives_the_base_back(folder):
    assert torch.equal(toys.logits(toys.trained(folder).unload()), toys.logits(toys.base(folder)))


def test_disable_adapter(folder):
    model, base = toys.trained(folder), toys.logits(toys.base(folder))
    trained = toys.logits(model)
    with model.disable_adapter():
        assert torch.equal(toys.logits(model), base)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(toys.logits(model), trained)
    assert any(p.requires_grad for p in model.parameters())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(toys.logits(model), base)


def test_adapters_are_switched(folder):
    model = several(folder)
    two = toys.logits(model)
    model.set_adapter("default")
    one = toys.logits(model)
    assert not torch.allclose(one, two)
    model.set_adapter("two")
    assert torch.equal(toys.logits(model), two)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("three")


def test_adapters_are_deleted(folder):
    model = several(folder)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("three")
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("two")
    assert model.active_adapters == ["default"]
    assert list(tuner_of(model).states) == ["default"]
    assert not any("two" in name for name, _ in model.named_parameters())
    model.delete_adapter("default")
    assert model.active_adapters == []
    model.base_model(**INPUTS)  # without an adapter PeftModel itself cannot be called


def test_a_task_that_others_stand_on_is_not_deleted(folder):
    model = toys.trained(folder)
    model.add_adapter("two", toys.config("two"))
    model.set_adapter("two")
    calibrate(model, toys.batches(50), steps=2)
    with pytest.raises(ConfigError, match="two was trained on top of 'default'"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default", "two"]


def test_positions_of_a_deleted_task_are_free_again(folder):
    model = toys.trained(folder, sparsity=0.4)
    with pytest.raises(ConfigError, match="positions"):
        model.add_adapter("two", toys.config("two", sparsity=0.4))
    finish_task(model)
    model.delete_adapter("default")
    with pytest.raises(ConfigError, match="seed"):
        model.add_adapter("two", toys.config("two", sparsity=0.4, seed=1))  # A is still the first's
    model.add_adapter("two", toys.config("two", sparsity=0.4))


def test_status_of_layers_and_model(folder):
    model = several(folder)
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.enabled, status.available_adapters) == (6, True, ["default", "two"])
    assert status.peft_types == {"default": "LORAF", "two": "LORAF"}
    assert status.active_adapters == ["two"]
    (kind,) = {layer.module_type for layer in model.get_layer_status()}
    assert kind == "loraf.LorafLayer"


def test_a_finished_task_cannot_be_made_trainable(folder):
    model = toys.trained(folder)
    finish_task(model)
    model.set_requires_grad("default")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_generation(folder):
    model = toys.trained(folder)
    ids = INPUTS["input_ids"][:1, :4]
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(out, merged.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_requests_for_several_adapters_in_one_batch_are_refused(folder):
    with pytest.raises(ConfigError, match="adapter_names"):
        several(folder)(**INPUTS, adapter_names=["default", "two", "default", "two"])


def test_a_model_is_copied_and_pickled(folder):
    model = toys.trained(folder)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(toys.logits(other), toys.logits(model))
        toys.loop(other, toys.batches(3))


def test_a_copied_model_saves_its_own_values(folder, tmp_path):
    model = toys.trained(folder)
    other = copy.deepcopy(model)
    toys.loop(other, toys.batches(3))
    other.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toys.base(folder), tmp_path)
    assert torch.equal(toys.logits(loaded), toys.logits(other))
    assert (tmp_path / "loraf.json").exists()


def test_injected_without_a_wrapper(folder):
    model = inject_adapter_in_model(toys.config(), toys.base(folder))
    assert torch.equal(toys.logits(model), toys.logits(toys.base(folder)))
    with pytest.raises(ConfigError, match="not chosen yet"):
        model(**BATCH).loss.backward()


def test_half_precision(folder):
    model = toys.trained(folder)
    expected = toys.logits(model)
    model.bfloat16()
    assert (toys.logits(model).float() - expected).abs().max() < 0.3


def test_conversion_to_lora_of_full_rank_is_exact(folder):
    """B has rank 8 columns, so LoRA of rank 8 holds ΔW."""
    model = toys.trained(folder)
    config, state = convert_to_lora(model, rank=8)
    from peft import get_peft_model

    lora = get_peft_model(toys.base(folder), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(toys.logits(lora), toys.logits(model), rtol=1e-3, atol=1e-3)


def test_code_that_computes_with_a_target_s_weight_is_refused(folder):
    layer = next(iter(tuner_of(toys.trained(folder)).layers().values()))
    assert layer.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="leaves out the adapter"):
        torch.ones(1, layer.in_features) @ layer.weight.t()


def test_adapters_of_another_method_are_refused(folder):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="different peft types"):
        toys.trained(folder).add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_a_selected_set_outlives_disable_adapter(folder):
    model = toys.trained(folder)
    select_tasks(model, "one:0.5")
    selected = toys.logits(model)
    with model.disable_adapter():
        assert torch.equal(toys.logits(model), toys.logits(toys.base(folder)))
        with pytest.raises(ConfigError, match="switched off"):
            select_tasks(model, "one")
        with pytest.raises(ConfigError, match="nothing to merge"):
            model.merge_and_unload()
    assert torch.equal(toys.logits(model), selected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(toys.logits(model), selected)
