"""A base in bitsandbytes' four bits: it trains, it is saved, and it is not merged."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf_train.adapter import quantised
from loraf_train.peft import calibrate, load_tasks, next_task
from tests.loraf_train.peft import toys
from tests.loraf_train.peft.test_trainers import sft, trainer

if problem := quantised.machine_problem("", torch.device("cpu")):
    pytest.skip(problem.message, allow_module_level=True)


def base(folder):
    settings = quantised.four_bit(torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    quantised.settle(model)
    return model


def test_two_tasks_train_and_are_saved(folder, tmp_path):
    model = get_peft_model(base(folder), toys.config())
    assert quantised.is_quantised_model(model)
    calibrate(model, toys.batches(3), steps=2, learning_rate=1e-2)
    losses = toys.loop(model, toys.batches(3), 12)
    assert losses[-1] < losses[0] - 0.3
    first = toys.logits(model)
    next_task(model, toys.config("two"))
    trainer(model, tmp_path, 50).train()
    model.save_pretrained(tmp_path / "out")
    model.set_adapter("default")
    torch.testing.assert_close(toys.logits(model), first)
    assert Checkpoint.open(tmp_path / "out").manifest.task_names == ("one", "two")
    loaded = load_tasks(base(folder), tmp_path / "out", ["one"])
    torch.testing.assert_close(toys.logits(loaded), first)


def test_trl_trains_float32_values(folder, tmp_path):
    """TRL casts trainable parameters on a quantised base to bfloat16, in which small steps are lost."""
    model = get_peft_model(base(folder), toys.config())
    made = sft(model, folder, tmp_path)
    assert {v.dtype for v in toys.values(model).values()} == {torch.bfloat16}
    made.train()
    assert {v.dtype for v in toys.values(model).values()} == {torch.float32}
    assert any(bool((v != v.bfloat16().float()).any()) for v in toys.values(model).values())


def test_it_is_not_merged(folder):
    model = get_peft_model(base(folder), toys.config())
    calibrate(model, toys.batches(3), steps=2)
    with pytest.raises(ConfigError, match="a quantised weight cannot hold ΔW"):
        model.merge_and_unload()
