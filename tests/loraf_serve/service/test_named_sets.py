"""Named sets over the wire: listed with their origin, selected like tasks, and in force while adapters change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from loraf_serve import client_cli
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.client import ServiceError
from loraf_serve.v1 import adapter_pb2
from tests.loraf_serve.fake_backend import expected_text
from tests.loraf_serve.harness import Running, checkpoint_folder, model_folder, serving

CHECKPOINT, OPERATOR = adapter_pb2.SET_ORIGIN_CHECKPOINT, adapter_pb2.SET_ORIGIN_OPERATOR


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`ckpt` with the tasks math, nlu and code and the sets support and narrow; `plain` without sets."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("ckpt", "plain"):
        shutil.copytree(checkpoint_folder(), folder / name)
    checkpoint = Checkpoint.open(folder / "ckpt")
    checkpoint.set_named_set("support", {"math": 1.0, "nlu": 0.5})
    checkpoint.set_named_set("narrow", {"nlu": 2.0})
    return folder


@pytest.fixture(scope="module")
def running(root) -> Iterator[Running]:
    sets = OperatorSets.parse(["narrow=code:3", "pair/mine=nlu", "nothing=math:0", "trio/sums=math:2"])
    registry = check_adapters([f"trio={root / 'ckpt'}", f"pair={root / 'ckpt'}@nlu+code"], model_folder())
    with serving(adapters=registry.with_sets(sets), root=root) as server:
        yield server


def shown(adapter: adapter_pb2.Adapter) -> list[tuple[str, dict[str, float], int]]:
    return [(s.name, {task.name: task.weight for task in s.tasks}, s.origin) for s in adapter.sets]


def test_adapters_show_their_sets_by_name_with_origin(running):
    trio, pair = running.client.adapters()
    narrow, nothing = ("narrow", {"code": 3.0}, OPERATOR), ("nothing", {}, OPERATOR)
    sums, support = ("sums", {"math": 2.0}, OPERATOR), ("support", {"math": 1.0, "nlu": 0.5}, CHECKPOINT)
    assert shown(trio) == [narrow, nothing, sums, support]
    assert shown(pair) == [("mine", {"nlu": 1.0}, OPERATOR), narrow]
    request = adapter_pb2.GetAdapterRequest(name="trio")
    assert running.adapters.GetAdapter(request).adapter == trio


@pytest.mark.parametrize(
    ("adapter", "named", "weights"),
    [
        ("trio", "support", (("math", 1.0), ("nlu", 0.5))),
        ("trio", "narrow", (("code", 3.0),)),
        ("pair", "mine", (("nlu", 1.0),)),
        ("trio", "nothing", ()),
    ],
)
def test_a_named_set_answers_as_its_tasks_would(running, adapter, named, weights):
    answer = running.client.generate("hello", adapter=adapter, named=named, max_tokens=5)
    request = running.backend.requests[-1]
    assert request.task_set == TaskSet(weights)
    assert answer.text == expected_text(request)
    served_by = answer.response.served_by
    assert tuple((task.name, task.weight) for task in served_by.tasks) == weights
    assert "".join(p.text for p in running.client.stream("hello", adapter=adapter, named=named, max_tokens=5)) == (
        answer.text
    )


@pytest.mark.parametrize(
    ("adapter", "named", "parts"),
    [
        ("trio", "mine", ["adapter 'trio' has no named set 'mine'", "choose from: narrow, nothing, sums, support"]),
        ("pair", "support", ["choose from: mine, narrow"]),  # a task of it was not loaded
        ("trio", "", ["no named set ''"]),
        ("trio", "math", ["'math' is a task, not a named set", "select it with tasks"]),
    ],
)
def test_an_unknown_set_is_not_found_and_the_error_lists_what_there_is(running, adapter, named, parts):
    with pytest.raises(ServiceError) as caught:
        running.client.generate("x", adapter=adapter, named=named)
    assert caught.value.code == "NOT_FOUND"
    assert all(part in caught.value.message for part in ["task_selection.named.name", *parts])


def test_a_set_of_one_task_has_that_tasks_template(running):
    running.client.generate("1 + 1", adapter="trio", named="sums", apply_task_template=True, max_tokens=1)
    of_set = running.backend.requests[-1].prompt_token_ids
    running.client.generate("1 + 1", adapter="trio", tasks=["math"], apply_task_template=True, max_tokens=1)
    assert of_set == running.backend.requests[-1].prompt_token_ids
    with pytest.raises(ServiceError, match="exactly one task"):
        running.client.generate("x", adapter="trio", named="support", apply_task_template=True)


def test_sets_change_with_what_is_loaded_and_the_operators_stay(running):
    client = running.client
    try:
        loaded = client.load_adapter("new", "plain")
        assert [s.name for s in loaded.sets] == ["narrow", "nothing"]
        # The same content, whose sets are not part of the digest.
        replaced = client.load_adapter("new", "ckpt", replace=True)
        assert replaced.digest == loaded.digest
        assert [(s.name, s.origin) for s in replaced.sets] == [
            ("narrow", OPERATOR), ("nothing", OPERATOR), ("support", CHECKPOINT)
        ]  # fmt: skip
        # Without code the operator's narrow is not a set of it, and the checkpoint's is.
        part = client.load_adapter("new", "ckpt", ["nlu"], replace=True)
        assert [(s.name, s.origin) for s in part.sets] == [("narrow", CHECKPOINT)]
    finally:
        client.unload_adapter("new")
    assert [adapter.name for adapter in client.adapters()] == ["trio", "pair"]


def test_a_checkpoint_with_a_task_of_a_sets_name_is_not_loaded(root):
    registry = check_adapters([f"pair={root / 'ckpt'}@nlu+code"], model_folder())
    registry = registry.with_sets(OperatorSets.parse(["math=nlu"]))
    with serving(adapters=registry, root=root) as server:
        with pytest.raises(ServiceError) as caught:
            server.client.load_adapter("new", "ckpt")
        assert caught.value.code == "FAILED_PRECONDITION"
        assert "--set math=nlu: 'math' is the name of a task of adapter 'new'" in caught.value.message
        assert [adapter.name for adapter in server.client.adapters()] == ["pair"]


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("support", "math+nlu:0.5"),
        ("narrow", "code:3"),
        ("math", "math"),
        ("math+nlu:0.5", "math+nlu:0.5"),
        ("all", "math+nlu+code"),
        ("base", "base"),
        ("as_trained=nlu", "math+nlu"),
    ],
)
def test_the_command_takes_any_set(running, capsys, text, selected):
    arguments = ["--server", running.address, "--adapter", "trio", "--tasks", text, "--max-tokens", "1"]
    assert client_cli.main(["generate", "hello", *arguments]) == 0
    assert f"[{selected}; " in capsys.readouterr().err


def test_the_command_names_what_is_wrong_with_a_set(running, capsys):
    with pytest.raises(SystemExit):
        client_cli.main(["generate", "x", "--tasks", "math+all"])
    assert "'all' takes no weight and no other task beside it" in capsys.readouterr().err
    arguments = ["--server", running.address, "--adapter", "trio", "--tasks", "art"]
    assert client_cli.main(["generate", "x", *arguments]) == 2
    assert "there is no task 'art' → choose from: math, nlu, code" in capsys.readouterr().err
    with pytest.raises(ServiceError, match="'support' is a named set, not a task → select it with named"):
        running.client.generate("x", adapter="trio", tasks=["support"])


def test_the_list_of_adapters_shows_sets(running, capsys):
    assert client_cli.main(["adapters", "--server", running.address]) == 0
    out = capsys.readouterr().out
    assert "support = math+nlu:0.5" in out and "narrow = code:3" in out
