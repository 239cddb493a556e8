"""Values of another kind than a setting's: nothing is taken for a number or a boolean that is none."""

from __future__ import annotations

import types
import typing

import pytest
import yaml
from pydantic import ValidationError

from loraf_train.settings.config import RunFile, TaskEntry
from loraf_train.settings.declare import SettingsModel
from loraf_train.settings.loading import load
from loraf_train.settings.problems import model_in
from tests.loraf_train.settings.test_config import SMALL, changed, problems_of, write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "field", "message", "remedy"),
    [
        ({"training__packing": "yes"}, "training.packing", "'yes' is neither true nor", "true or"),
        ({"training__packing": 1}, "training.packing", "1 is neither true nor", "true or"),
        ({"tasks__0__data__streaming": "no"}, "tasks[0].data.streaming", "'no' is neither true nor", "true or"),
        ({"training__max_steps": 10**24}, "training.max_steps", "out of range", "whole number from 1"),
        ({"training__batch_size": 10**24}, "training.batch_size", "out of range", "whole number from 1"),
        ({"training__epochs": 1e300}, "training.epochs", "out of range", "number above 0"),
        ({"training__beta": "0.1"}, "training.beta", "'0.1' is text, not a number", "without quotes"),
        ({"training__max_steps": "32"}, "training.max_steps", "'32' is text, not a number", "without quotes"),
        ({"output": ""}, "output", "is empty", "folder of the checkpoint"),
        (
            {"tasks__0__objective": "dpo", "tasks__0__max_new_tokens": 4},
            "tasks[0].max_new_tokens",
            "scored without an answer",
            "leave it out",
        ),
        (
            {"compare": {"methods": {"lora": {"training": {"early_stopping": {"patience": 2}}}}}},
            "compare.methods.lora.training.early_stopping",
            "does not keep to it",
            "leave it out",
        ),
        (
            {"compare": {"methods": {"loraf": {"tasks": {"a": {"training": {"beta": 0.2}}}}}}},
            "compare.methods.loraf.tasks.a.training.beta",
            "does not keep to it",
            "leave it out",
        ),
    ],
)
def test_a_mistake_names_its_field_and_a_remedy(folder, change, field, message, remedy):
    ((found, (said, advice)),) = problems_of(write(folder, changed(**change))).items()
    assert (found, message in said, remedy in advice) == (field, True, True), (found, said, advice)


def settings_of(model: type[SettingsModel], seen: tuple[type[SettingsModel], ...] = ()):
    """(model, field, type) of every setting below a model."""
    for name, field in model.model_fields.items():
        yield model, name, field.annotation
        inner = model_in(field.annotation)
        if inner is not None and issubclass(inner, SettingsModel) and inner not in seen:
            yield from settings_of(inner, (*seen, model))


def scalars(kind) -> set[type]:
    """int, float, bool and others in a type and in its unions, but not those in lists and mappings."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return set().union(*map(scalars, typing.get_args(kind)))
    return {getattr(kind, "__origin__", kind)} if typing.get_origin(kind) is typing.Annotated else {kind}


def test_no_setting_takes_text_for_a_number_or_a_boolean_or_a_boolean_for_a_number():
    found = {(model, name): kind for root in (RunFile, TaskEntry) for model, name, kind in settings_of(root)}
    plain = {key: scalars(kind) for key, kind in found.items()}
    assert sum(bool in kinds for kinds in plain.values()) == 3 and len(plain) > 60
    for (model, name), kinds in plain.items():
        refused = {bool: ("yes", "off", "true", "1", 1, 0, 1.0), int: ("2", "010", True), float: ("0.5", ".5", False)}
        for value in [value for kind, values in refused.items() if kind in kinds for value in values]:
            with pytest.raises(ValidationError) as caught:
                model.model_validate({name: value})
            assert any(error["loc"][:1] == (name,) for error in caught.value.errors()), (model, name, value)


@pytest.mark.parametrize(
    ("written", "message"),
    [("010", "'010' is text"), ("1:30", "'1:30' is not a whole number"), ("2024-01-01", "is not a whole number")],
)
def test_what_yaml_1_1_alone_reads_as_a_number_is_refused(folder, written, message):
    """They would be 8, 90 and a date."""
    text = yaml.safe_dump(SMALL) + f"seed: {written}\n"
    assert message in problems_of(write(folder, text))["seed"][0]


def test_a_date_is_text_where_text_is_wanted(folder):
    assert load(write(folder, SMALL), ["tasks.a.name=2024-01-01"]).tasks[0].name == "2024-01-01"


def test_a_tracker_that_is_named_twice_logs_once(folder):
    config = load(write(folder, changed(training__report_to=["wandb", "tensorboard", "wandb"])))
    assert config.training.report_to == ("wandb", "tensorboard")
