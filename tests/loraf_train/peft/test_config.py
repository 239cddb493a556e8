"""What a LorafConfig takes, and what it refuses: all mistakes at once, by the names of its fields."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import TaskType
from transformers import LlamaModel

from loraf.errors import ConfigError
from loraf_train.peft import LorafConfig, LorafModel
from loraf_train.peft.register import loraf_type, register
from loraf_train.settings.parts import AdapterConfig, RetentionConfig, TrainingConfig
from tests.loraf_train.peft import toys


def test_peft_knows_the_method():
    assert PeftType.LORAF == PeftType("LORAF") == PeftType["LORAF"] == "LORAF"
    assert PeftType.LORAF in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORAF] is LorafConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORAF] is LorafModel
    assert pickle.loads(pickle.dumps(PeftType.LORAF)) is PeftType.LORAF


def test_registering_again_is_a_no_op():
    before = list(PeftType)
    register(LorafConfig, LorafModel)
    assert list(PeftType) == before
    assert loraf_type() is PeftType.LORAF


def test_the_defaults_are_those_of_tasks_yaml():
    config = LorafConfig()
    adapter, training = AdapterConfig(), TrainingConfig()
    assert (config.r, config.sparsity, config.dtype) == (adapter.rank, adapter.sparsity, adapter.dtype)
    assert (config.dropout, config.retention) == (training.dropout, RetentionConfig().budget)
    assert config.scaling == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"alpha": -1}, "alpha"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": None}, "sparsity"),
        ({"dropout": 1.0}, "dropout"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 32}, "seed"),
        ({"init_std": 0.0}, "init_std"),
        ({"dtype": "int8"}, "dtype"),
        ({"retention": 0}, "retention"),
        ({"start": "zero"}, "start"),
        ({"task_name": "All caps"}, "task_name"),
        ({"task_name": "all"}, "task_name"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"task_type": TaskType.SEQ_CLS}, "task_type"),
    ],
)
def test_wrong_values_are_refused_by_name(fields, field):
    with pytest.raises(ConfigError, match=rf"LorafConfig: {field}: .*→"):
        LorafConfig(**fields)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        LorafConfig(r=0, sparsity=2, task_name="", modules_to_save=["x"])
    assert [problem.field for problem in error.value.problems] == ["task_name", "r", "sparsity", "modules_to_save"]


@pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern"])
def test_a_field_of_lora_is_no_field_here(field):
    with pytest.raises(TypeError, match=field):
        LorafConfig(**{field: 1})


def test_what_a_trainer_sets_later_is_refused_too(folder):
    """TRL appends to modules_to_save when it has added tokens."""
    config = toys.config()
    config.modules_to_save = ["lm_head"]
    with pytest.raises(ConfigError, match="modules_to_save"):
        get_peft_model(toys.base(folder), config)


def test_it_is_written_and_read_by_peft(tmp_path):
    config = toys.config(seed=3, layers_to_transform=[1])
    config.save_pretrained(tmp_path)
    for read in (PeftConfig.from_pretrained(tmp_path), LorafConfig.from_pretrained(tmp_path)):
        assert type(read) is LorafConfig
        assert read.to_dict() == config.to_dict()
    assert get_peft_config(config.to_dict()).to_dict() == config.to_dict()


def test_a_config_that_belongs_to_a_model_is_copied_without_it(folder):
    model = toys.adapted(folder)
    config = model.peft_config["default"]
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
        assert other._write is None


@pytest.mark.parametrize(
    ("targets", "options", "count"),
    [
        (["q_proj", "v_proj"], {}, 4),
        ("q_proj", {}, None),
        (r".*\.1\..*(q|v)_proj", {}, 2),
        ("all-linear", {}, 14),
        (None, {}, 14),
        (["q_proj"], {"layers_to_transform": 1}, 1),
        (["q_proj", "v_proj"], {"exclude_modules": ["v_proj"]}, 2),
        (["model.layers.0.mlp.up_proj"], {}, 1),
    ],
)
def test_target_modules_are_matched_as_for_lora(folder, targets, options, count):
    if count is None:
        with pytest.raises(ValueError, match="not found in the base model"):
            toys.adapted(folder, target_modules=targets, **options)
        return
    layers = toys.adapted(folder, target_modules=targets, **options).base_model.layers()
    assert len(layers) == count


def test_other_layers_than_linear_ones_are_refused(folder):
    with pytest.raises(ConfigError, match=r"target_modules: 'embed_tokens' is a Embedding, not a torch.nn.Linear"):
        toys.adapted(folder, target_modules=["embed_tokens"])


@pytest.mark.parametrize("kind", [torch.nn.Linear, LlamaModel], ids=["module", "body"])
def test_other_models_than_causal_ones_are_refused(folder, kind):
    if kind is LlamaModel:
        model = LlamaModel.from_pretrained(folder)
    else:
        model = torch.nn.Sequential(OrderedDict(q_proj=torch.nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="not a causal language model"):
        get_peft_model(model, toys.config(target_modules=["q_proj"]))


@pytest.mark.parametrize("fields", [{"r": 8.0}, {"alpha": "16"}, {"r": "8"}, {"dropout": "0.1"}])
def test_numbers_of_another_type_are_refused(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}: .* cannot be used"):
        LorafConfig(**fields)
