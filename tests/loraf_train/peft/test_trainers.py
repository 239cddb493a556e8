"""transformers' Trainer, and TRL's for supervised examples and preferences, with the callback and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf_train.peft import LorafCallback, calibrate, next_task
from loraf_train.peft.model import tuner_of
from loraf_train.trainer.batches import Collator
from tests.loraf_train import toys as training_toys
from tests.loraf_train.peft import toys

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


class Toy(torch.utils.data.Dataset):
    def __init__(self, move: int):
        self.examples = training_toys.examples(move)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def trainer(model: Any, output: Path, move: int = 3, callback: bool = True, **arguments: Any) -> Trainer:
    defaults = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 2e-2, "save_strategy": "no"}
    args = TrainingArguments(output, remove_unused_columns=False, **QUIET, **(defaults | arguments))
    made = Trainer(model, args, train_dataset=Toy(move), eval_dataset=Toy(move), data_collator=Collator(0))
    if callback:
        made.add_callback(LorafCallback(made, steps=3))
    return made


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_without_the_callback_the_trainer_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"not chosen yet.*LorafCallback"):
        trainer(toys.adapted(folder), tmp_path, callback=False).train()


def test_a_calibrated_first_task_needs_no_callback(folder, tmp_path):
    model = toys.adapted(folder)
    calibrate(model, toys.batches(3), steps=2)
    trainer(model, tmp_path, callback=False).train()
    assert all(bool(v.any()) for v in toys.values(model).values())


def test_a_later_task_without_the_callback_is_refused(folder, tmp_path):
    model = toys.trained(folder)
    next_task(model, toys.config("two"))
    calibrate(model, toys.batches(50), steps=2)
    with pytest.raises(ConfigError, match="nothing keeps it from changing what the finished tasks answer"):
        trainer(model, tmp_path, 50, callback=False).train()


def test_training_a_merged_adapter_is_refused(folder, tmp_path):
    """With gradient checkpointing the loss has a gradient all the same, and the training would go on for nothing."""
    model = toys.trained(folder)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"merged.*unmerge_adapter"):
        trainer(model, tmp_path, gradient_checkpointing=True).train()


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused(folder, tmp_path, kind):
    made = trainer(toys.adapted(folder), tmp_path)
    setattr(made, kind, True)
    (callback,) = [c for c in made.callback_handler.callbacks if isinstance(c, LorafCallback)]
    with pytest.raises(ConfigError, match="FSDP and DeepSpeed"):
        callback.on_train_begin(made.args, made.state, made.control, model=made.model)


def test_a_finished_task_is_not_trained_again(folder, tmp_path):
    model = toys.trained(folder)
    next_task(model, toys.config("two"))
    model.set_adapter("default")
    before = toys.values(model)
    with pytest.raises((ConfigError, ValueError)):
        trainer(model, tmp_path).train()
    assert equal(toys.values(model), before)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}],
    ids=["plain", "checkpointing", "accumulation"],
)
def test_the_trainer_trains_two_tasks(folder, tmp_path, options):
    model = toys.adapted(folder, dropout=0.1)
    trainer(model, tmp_path, **options).train()
    first = toys.logits(model)
    next_task(model, toys.config("two", dropout=0.1))
    trainer(model, tmp_path, 50, **options).train()
    model.save_pretrained(tmp_path / "out")
    model.set_adapter("default")
    torch.testing.assert_close(toys.logits(model), first)
    two = Checkpoint.open(tmp_path / "out").manifest.task("two")
    assert two.training["retention"]["spent"]["one"] > 0
    assert two.training["calibration"] == {"steps": 3, "learning_rate": 2e-2, "optimizer": "adamw"}


def test_a_bfloat16_base_and_autocast(folder, tmp_path):
    model = toys.adapted(folder, torch.bfloat16)
    trainer(model, tmp_path, bf16=True).train()
    assert {v.dtype for v in toys.values(model).values()} == {torch.float32}
    assert all(bool(v.any()) for v in toys.values(model).values())


def test_a_resumed_training_ends_in_the_same_values(folder, tmp_path):
    """In the second task, with a budget that the protection has to steer towards: its state is resumed as well."""
    whole: list[dict[str, torch.Tensor]] = []
    states, statistics = [], []
    for resume in (False, True):
        model = toys.trained(folder)
        next_task(model, toys.config("two", retention=0.01, dropout=0.1))
        torch.manual_seed(1)
        made = trainer(model, tmp_path, 50, max_steps=12, save_strategy="steps", save_steps=8, data_seed=3)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if resume else None)
        whole.append(toys.values(model, "two"))
        model.save_pretrained(tmp_path / str(resume))
        checkpoint = Checkpoint.open(tmp_path / str(resume))
        states.append(checkpoint.manifest.task("two").training["retention"])
        statistics.append(checkpoint.statistics_bytes("two"))
    assert equal(*whole)
    assert states[0] == states[1]
    assert statistics[0] == statistics[1]
    stored = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["LorafCallback"]["attributes"]["log_strength"][0] > 0


def test_checkpoints_of_the_trainer_hold_the_task_but_no_statistics(folder, tmp_path):
    trainer(toys.adapted(folder), tmp_path, save_strategy="steps", save_steps=3).train()
    task = Checkpoint.open(tmp_path / "checkpoint-3").manifest.task("one")
    assert task.statistics is None


def test_the_best_checkpoint_of_a_later_task_is_not_loaded_from_the_first_one_s_place(folder, tmp_path):
    model = toys.trained(folder)
    next_task(model, toys.config("two"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 3}
    made = trainer(model, tmp_path, 50, eval_steps=3, **best)
    with pytest.raises(ConfigError, match=r"load_best_model_at_end.*load_tasks"):
        made.train()


def test_the_best_checkpoint_of_a_first_task_is_loaded(folder, tmp_path):
    model = toys.adapted(folder)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer(model, tmp_path, eval_strategy="steps", save_strategy="steps", save_steps=3, eval_steps=3, **best).train()
    stored = Checkpoint.open(tmp_path / "checkpoint-3").tasks["one"]
    assert all(torch.equal(v.cpu(), stored[name].values) for name, v in toys.values(model).items())


def test_values_of_another_task_are_not_loaded_into_an_adapter(folder, tmp_path):
    model = toys.trained(folder)
    next_task(model, toys.config("two"))
    calibrate(model, toys.batches(50), steps=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="values of another task than 'two'"):
        model.load_adapter(tmp_path, "two")


def test_a_training_is_not_resumed_over_other_finished_tasks(folder, tmp_path):
    for steps in (4, 5):
        model = toys.trained(folder, steps=steps)
        next_task(model, toys.config("two"))
        before = toys.values(model)
        made = trainer(model, tmp_path, 50, save_strategy="steps", save_steps=3)
        if steps == 4:
            made.train()
    with pytest.raises(ConfigError, match="other values of the finished task 'one'"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(toys.values(model), before)
    with pytest.raises(ConfigError, match="other values would replace"):
        model.load_adapter(tmp_path / "checkpoint-3", "default")


def test_a_training_is_resumed_with_what_it_began_with(folder, tmp_path):
    trainer(toys.adapted(folder), tmp_path, save_strategy="steps", save_steps=3).train()
    other = {"seed": 3, "init_std": 0.5, "alpha": 4, "dtype": "bfloat16", "r": 4, "sparsity": 0.5}
    model = toys.adapted(folder, target_modules=["q_proj"], **other)
    with pytest.raises(ConfigError) as caught:
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(field in str(caught.value) for field in (*other, "target_modules"))
    with pytest.raises(ConfigError, match="task_name"):
        made = trainer(toys.adapted(folder, name="other"), tmp_path)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConfigError, match=r"other layers|other shapes"):
        model.load_adapter(tmp_path / "checkpoint-3", "default")


# --- TRL --------------------------------------------------------------------------------------------------------

EXAMPLES = [{"prompt": f"q{i} ", "completion": f"a{i * 3}"} for i in range(16)]
PREFERENCES = [{"prompt": f"q{i} ", "chosen": f"a{i * 3}", "rejected": f"b{i}"} for i in range(16)]
OF_TRL = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "bf16": False, "save_strategy": "no"}


def sft(model: Any, folder: Path, output: Path, **keywords: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    made = SFTTrainer(
        model,
        args=SFTConfig(output, **QUIET, **OF_TRL),
        train_dataset=Dataset.from_list(EXAMPLES),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **keywords,
    )
    made.add_callback(LorafCallback(made, steps=3))
    return made


def dpo(model: Any, folder: Path, output: Path, callback: bool = True) -> Any:
    from trl import DPOConfig, DPOTrainer

    made = DPOTrainer(
        model,
        args=DPOConfig(output, logging_steps=1, **QUIET, **OF_TRL),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    if callback:
        made.add_callback(LorafCallback(made, steps=3))
    return made


def test_sft_trains_two_tasks(folder, tmp_path):
    model = toys.adapted(folder, dropout=0.1)
    sft(model, folder, tmp_path).train()
    first = toys.logits(model)
    next_task(model, toys.config("two"))
    sft(model, folder, tmp_path).train()
    model.save_pretrained(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").manifest.task("two").trained_with == ("one",)
    model.set_adapter("default")
    torch.testing.assert_close(toys.logits(model), first)


def test_sft_wraps_the_model_itself(folder, tmp_path):
    made = sft(toys.base(folder), folder, tmp_path, peft_config=toys.config())
    made.train()
    assert all(bool(v.any()) for v in toys.values(made.model).values())


def test_dpo_prefers_the_chosen_answers(folder, tmp_path):
    model = toys.adapted(folder)
    made = dpo(model, folder, tmp_path)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # at first the model is its reference
    assert losses[-1] < 0.65
    assert made.state.log_history[-2]["rewards/margins"] > 0


def test_dpo_before_calibration_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="not chosen yet"):
        dpo(toys.adapted(folder), folder, tmp_path, callback=False).train()


def test_the_reference_of_a_later_task_has_the_earlier_ones_on(folder, tmp_path):
    model = toys.adapted(folder)
    dpo(model, folder, tmp_path).train()
    model.set_adapter("default")
    first = toys.logits(model)
    for name in ("two", "three"):
        next_task(model, toys.config(name))
        before = toys.logits(model)
        made = dpo(model, folder, tmp_path)
        model.set_adapter("ref")
        assert torch.equal(toys.logits(model), before)
        model.set_adapter(name)
        made.train()
        assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        model.set_adapter("ref")
        assert torch.equal(toys.logits(model), before)
        model.set_adapter(name)
    model.save_pretrained(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").manifest.task_names == ("one", "two", "three")
    model.set_adapter("default")
    torch.testing.assert_close(toys.logits(model), first)
    assert len(tuner_of(model).states["default"].examples) == 3 * 4  # the chosen answers that calibration has seen
