"""Every setting is documented where it is declared, and the reference lists all of them."""

from __future__ import annotations

import re

import pytest

from loraf_train.settings.comparison import CompareConfig, MethodSettings
from loraf_train.settings.config import RunFile, TaskEntry
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from loraf_train.settings.declare import SettingsModel
from loraf_train.settings.parts import (
    AdapterConfig,
    CalibrationConfig,
    EarlyStoppingConfig,
    RetentionConfig,
    TaskOverrides,
    TrainingConfig,
)
from loraf_train.settings.reference import REQUIRED, describe_settings

WRITTEN = (
    RunFile,
    TaskEntry,
    AdapterConfig,
    CalibrationConfig,
    EarlyStoppingConfig,
    TrainingConfig,
    DataConfig,
    RecordSource,
    EvaluationSource,
    CompareConfig,
    MethodSettings,
    RetentionConfig,
    TaskOverrides,
)
SETTINGS = {setting.key: setting for setting in describe_settings()}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_has_a_meaning_and_says_what_may_be_written(setting):
    assert re.fullmatch(r"[A-Z].*\.", setting.meaning), "write one sentence"
    assert setting.type and setting.expects
    assert not setting.expects.endswith("."), "it completes «use …»"


def test_every_field_of_every_part_is_listed():
    """Models that a file's parts are validated with; a new one must be reached from `RunFile`."""

    def parts(model: type[SettingsModel]) -> set[type[SettingsModel]]:
        return {model}.union(*map(parts, model.__subclasses__()))

    resolved = {"RunConfig", "TaskConfig"}  # what is left after loading; nobody writes it
    assert {m.__name__ for m in parts(SettingsModel)} == {m.__name__ for m in WRITTEN} | {"SettingsModel"} | resolved
    names = {key.rpartition(".")[2] for key in SETTINGS}
    assert names == {name for model in WRITTEN for name in model.model_fields}


def test_keys_types_and_defaults_read_as_in_the_file():
    assert SETTINGS["model"][1:3] == ("text", REQUIRED)
    assert SETTINGS["adapter"][1:3] == ("mapping", "")
    assert SETTINGS["training.learning_rate"][1:3] == ("number", "0.0001")
    assert SETTINGS["training.packing"][1:3] == ("true or false", "false")
    assert SETTINGS["calibration.batch_size"][1:3] == ("whole number", "null")
    assert SETTINGS["precision"][1:3] == ("auto | float32 | bfloat16", "auto")
    assert SETTINGS["tasks"][1:3] == ("list of mapping", REQUIRED)
    assert SETTINGS["tasks[].data.train[].file"][1:3] == ("path", "null")
    assert SETTINGS["tasks[].data.eval.<name>.choices"][1:3] == ("list of text", "[]")
    assert SETTINGS["compare.seeds"][1:3] == ("list of whole number", "[0, 1, 2]")
    assert SETTINGS["compare.methods.<name>.tasks.<name>.alpha"].default == "null"


def test_settings_come_in_the_order_of_a_file():
    keys = list(SETTINGS)
    order = ["model", "output", "seed", "adapter", "adapter.rank", "calibration", "training", "tasks", "tasks[].name"]
    assert [key for key in keys if key in order] == order
    assert keys.index("tasks[].data") < keys.index("tasks[].data.train") < keys.index("compare")
