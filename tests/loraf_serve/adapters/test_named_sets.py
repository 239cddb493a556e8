"""`--set [ADAPTER/]NAME=SET`: what it means for which adapter, and what is refused before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError, ConfigError
from loraf_serve import cli
from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.adapters.registry import Registry
from tests.loraf_serve.harness import checkpoint_folder, model_folder, open_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks math, nlu and code, and the named sets support and narrow."""
    copy = tmp_path_factory.mktemp("named") / "ckpt"
    shutil.copytree(checkpoint_folder(), copy)
    checkpoint = Checkpoint.open(copy)
    checkpoint.set_named_set("support", {"math": 1.0, "code": 0.5, "nlu": 0.0})
    checkpoint.set_named_set("narrow", {"nlu": 2.0})
    return copy


def sets_of(adapter, *texts: str) -> dict[str, str]:
    sets = Registry([adapter], OperatorSets.parse(texts)).sets_of(adapter)
    assert all(name == named.name for name, named in sets.items())
    return {name: f"{named.task_set}{'*' * named.by_operator}" for name, named in sets.items()}  # *: the operator's


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], {"narrow": "nlu:2.0", "support": "math+code:0.5"}),
        (["support=nlu"], {"narrow": "nlu:2.0", "support": "nlu*"}),
        (["support=nlu", "trio/support=code"], {"narrow": "nlu:2.0", "support": "code*"}),
        (["trio/support=code", "support=nlu", "pair/support=math"], {"narrow": "nlu:2.0", "support": "code*"}),
        (["a=all", "b=base", "c=as_trained=nlu", "d=narrow", "e=math,nlu:0.5"], {
            "a": "math+nlu+code*", "b": "base*", "c": "math+nlu*", "d": "nlu:2.0*", "e": "math+nlu:0.5*",
            "narrow": "nlu:2.0", "support": "math+code:0.5",
        }),
        (["other/x=math", "y=unknown+math"], {"narrow": "nlu:2.0", "support": "math+code:0.5"}),
    ],
)  # fmt: skip
def test_the_sets_of_an_adapter(folder, texts, expected):
    assert sets_of(open_adapter("trio", folder), *texts) == expected


def test_a_set_whose_tasks_were_not_all_loaded_is_not_offered(folder):
    texts = ("both=math+nlu", "trained=as_trained=nlu", "one=nlu")
    assert sets_of(open_adapter("trio", folder, ["nlu"]), *texts) == {"narrow": "nlu:2.0", "one": "nlu*"}


def test_the_operators_sets_hold_for_adapters_that_come_later_and_end_with_them(folder):
    whole, part = open_adapter("a", folder), open_adapter("a", folder, ["nlu"])
    registry = Registry([], OperatorSets.parse(["mine=math", "n=nlu"])).with_adapter(whole)
    assert list(registry.sets_of(whole)) == ["mine", "n", "narrow", "support"]
    replaced = registry.with_adapter(part)
    assert list(replaced.sets_of(part)) == ["n", "narrow"]
    assert list(replaced.sets_of(whole)) == ["mine", "n", "narrow", "support"]  # a message about the one before
    again = replaced.without("a").with_adapter(whole)
    assert list(again.sets_of(whole)) == ["mine", "n", "narrow", "support"]


def test_a_task_with_the_name_of_a_set_is_refused_when_it_is_loaded(folder):
    sets = OperatorSets.parse(["code=math", "other/nlu=math"])
    with pytest.raises(
        CheckpointError, match="--set code=math: 'code' is the name of a task of adapter 'trio'"
    ) as error:
        sets.require_free_names(open_adapter("trio", folder))
    assert len(error.value.problems) == 1
    sets.require_free_names(open_adapter("trio", folder, ["math", "nlu"]))


def refused(capsys, *options: str) -> str:
    assert cli.main(["check", "--port", "0", "--backend", "merged", "--model", str(model_folder()), *options]) == 2
    return capsys.readouterr().err


def test_malformed_options_are_named_all_at_once(capsys, folder):
    texts = [
        "support",
        "=math",
        "all=math",
        "A b=math",
        "x=",
        "x=math:17+all",
        "B/y=math",
        "/z=math",
        "s=math",
        "s=nlu",
    ]
    with pytest.raises(ConfigError) as caught:
        OperatorSets.parse(texts)
    message = str(caught.value)
    for part in (
        "--set support: names no task set → write [ADAPTER/]NAME=SET",
        "--set =math: '' is not a valid set name",
        "--set all=math: 'all' is reserved",
        "--set A b=math: 'A b' is not a valid set name",
        "--set x=: no task is named",
        "--set x=math:17+all: weight 17.0 is out of range",
        "--set x=math:17+all: 'all' takes no weight",
        "--set B/y=math: 'B' is not a valid adapter name",
        "--set /z=math: '' is not a valid adapter name",
        "--set s=nlu: the set 's' is given twice",
    ):
        assert part in message
    text = refused(capsys, "--adapter", f"trio={folder}", "--set", "base=math", "--set", "x=math:a")
    assert "'base' is reserved" in text and "weight 'a' is not a number" in text


def test_a_set_that_fits_no_adapter_is_refused_at_start(capsys, folder, tmp_path):
    trio, pair = ["--adapter", f"trio={folder}"], ["--adapter", f"pair={folder}@nlu+code"]
    text = refused(capsys, *trio, "--set", "x=math+art", "--set", "nlu=math", "--set", "none/x=math")
    assert "--set x=math+art: there is no task 'art' → choose from: math, nlu, code" in text
    assert "--set nlu=math: 'nlu' is the name of a task of adapter 'trio' → start the server with another name" in text
    assert "--set none/x=math: there is no adapter 'none' → choose from: trio" in text
    text = refused(capsys, *pair, "--set", "x=math", "--set", "support=support")
    assert "--set x=math: there is no task or named set 'math' → choose from: nlu, code, narrow" in text
    assert "--set support=support: there is no task or named set 'support'" in text
    text = refused(capsys, *trio, *pair, "--set", "x=art", "--set", "pair/y=math")
    assert "--set x=art: no adapter has all of its tasks: trio: there is no task or named set 'art'; pair: " in text
    assert "--set pair/y=math: there is no task or named set 'math'" in text
    assert "--set x=math: there is no adapter → choose from: none" in refused(capsys, "--set", "x=math")
    assert refused(capsys, *trio, "--set", "x=art", "--adapter-root", str(tmp_path))  # trio is there, and has it not
    later = ["--set", "later/x=art", "--adapter-root", str(tmp_path)]
    options = ["check", "--port", "0", "--backend", "merged", "--model", str(model_folder()), *trio, *later]
    assert cli.main(options) == 0
