"""The Python client and `loraf-client`, against a real server with the fake backend."""

from __future__ import annotations

import io
import json
import pickle
import sys

import pytest

from loraf_serve import client_cli
from loraf_serve.client import Client, ServiceError, request_of
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import TASKS, eventually, one_adapter, serving


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def cli(running, capsys):
    """Runs `loraf-client`; returns exit status, standard output, standard error."""

    def run(*arguments: str, server: str = running.address) -> tuple[int, str, str]:
        status = client_cli.main([*arguments, "--server", server])
        return status, *capsys.readouterr()

    return run


# --- the Python client


def test_generate(running):
    answer = running.client.generate("hello", tasks={"nlu": 0.5, "math": 1}, max_tokens=5, n=2, stop=["#"])
    passed = running.backend.requests[-1]
    assert str(passed.task_set) == "math+nlu:0.5" and passed.sampling.stop == ("#",)
    assert answer.text == str(answer) == expected_text(passed)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 5
    assert answer.response.choices[1].text == expected_text(passed, 1)


def test_stream(running):
    pieces = list(running.client.stream("hello", as_trained="nlu", max_tokens=5))
    assert "".join(piece.text for piece in pieces) == expected_text(running.backend.requests[-1])
    assert [piece.finish_reason for piece in pieces] == ["", "", "", "", "length"]
    assert pieces[-1].response.usage.completion_tokens == 5


def test_leaving_a_stream_early_cancels_it():
    with serving(FakeBackend(seconds_per_token=0.05)) as running:
        for _ in running.client.stream("hello", max_tokens=100):
            break
        assert eventually(lambda: not running.backend.running)
        assert running.backend.closed_early


def test_messages_and_token_ids(running):
    running.client.generate(messages=[{"role": "user", "content": "hi"}])
    chat = running.backend.requests[-1].prompt_token_ids
    running.client.generate(prompt_token_ids=chat)
    assert running.backend.requests[-1].prompt_token_ids == chat


def test_adapters_and_health(running):
    (adapter,) = running.client.adapters()
    assert adapter.digest == one_adapter().get("trio").digest
    assert [task.name for task in adapter.tasks] == list(TASKS)
    assert running.client.health() == "SERVING"


def test_a_refusal_is_readable_and_whole(running):
    with pytest.raises(ServiceError) as error:
        running.client.generate("", top_p=3.0)
    assert error.value.code == "INVALID_ARGUMENT"
    assert [field for field, _ in error.value.violations] == ["sampling.top_p", "prompt"]
    lines = str(error.value).splitlines()
    assert lines[0] == "INVALID_ARGUMENT:" and lines[1].startswith("1. sampling.top_p: 3 is out of range → ")
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.violations == error.value.violations
    with pytest.raises(ServiceError, match="NOT_FOUND: .*choose from: math, nlu, code"):
        next(running.client.stream("x", tasks=["art"]))


def test_a_full_queue_gives_the_time_to_retry():
    with serving(FakeBackend(seconds_per_token=0.1), max_queue=1) as running:
        stream = running.client.stream("x", max_tokens=100)
        next(stream)
        with pytest.raises(ServiceError) as error:
            running.client.generate("x")
        assert error.value.code == "RESOURCE_EXHAUSTED" and error.value.retry_after > 0
        stream.close()


def test_timeouts():
    with serving(FakeBackend(seconds_per_token=0.2)) as running:
        with pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
            running.client.generate("x", max_tokens=100, timeout=0.3)
        with Client(running.address, timeout=0.3) as client, pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
            list(client.stream("x", max_tokens=100))


@pytest.mark.parametrize("variable", ["http_proxy", "grpc_proxy"])
def test_a_client_of_the_same_machine_uses_no_proxy(running, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with Client(running.address) as client:
        assert client.health(timeout=10) == "SERVING"


def test_no_server():
    with Client("127.0.0.1:9") as client, pytest.raises(ServiceError) as error:
        client.health()
    assert error.value.code == "UNAVAILABLE"
    assert "no server can be reached at 127.0.0.1:9" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"prompt": "x", "messages": []}, TypeError, "one of prompt, messages and prompt_token_ids"),
        ({"prompt": "x", "tasks": ["a"], "base": True}, TypeError, "one of tasks, named, as_trained and base"),
        ({"prompt": "x", "tasks": "math"}, TypeError, r"tasks=\['math'\]"),
        ({"prompt": "x", "max_token": 3}, TypeError, "no field max_token"),
        ({"prompt": "x", "max_tokens": -3}, ValueError, "max_tokens=-3"),
        ({"prompt": "x", "temperature": "hot"}, TypeError, "temperature='hot'"),
    ],
)
def test_invalid_arguments_raise_python_errors(arguments, error, says):
    with pytest.raises(error, match=says):
        request_of(pb.GenerateRequest, **arguments)


def test_an_empty_list_of_tasks_does_not_mean_all_tasks():
    assert request_of(pb.GenerateRequest, "x", tasks=[]).task_selection.WhichOneof("selection") == "tasks"
    assert not request_of(pb.GenerateRequest, "x").HasField("task_selection")


# --- loraf-client


@pytest.mark.parametrize("no_stream", [[], ["--no-stream"]])
@pytest.mark.parametrize(
    ("selection", "set_"),
    [
        ([], "math+nlu+code"),
        (["--tasks", "nlu,math:0.5"], "math:0.5+nlu"),
        (["--as-trained", "nlu"], "math+nlu"),
        (["--base"], "base"),
    ],
)
def test_the_answer_goes_to_standard_output_and_served_by_to_standard_error(running, cli, selection, set_, no_stream):
    status, out, err = cli("generate", "hello", "--max-tokens", "6", *selection, *no_stream)
    passed = running.backend.requests[-1]
    assert (status, out) == (0, expected_text(passed) + "\n")
    assert str(passed.task_set) == set_ and passed.sampling.temperature == 0
    digest = one_adapter().get("trio").digest[:12]
    assert err.startswith(f"[{set_}; trio@{digest}, fake; 6 + 6 tokens; length; ")  # and the request's id


def test_sampling_options_reach_the_server(running, cli):
    options = ["--max-tokens", "3", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "5", "--seed", "1"]
    assert cli("generate", "x", *options, "--stop", "a b", "--stop", "c", "--adapter", "trio")[0] == 0
    passed = running.backend.requests[-1].sampling
    assert (passed.max_tokens, passed.temperature, passed.top_p, passed.top_k, passed.seed) == (3, 0.7, 0.9, 5, 1)
    assert passed.stop == ("a b", "c")


def test_the_prompt_may_come_from_standard_input_and_through_the_tasks_template(running, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 1"))
    assert cli("generate", "-", "--task-template", "--tasks", "math", "--max-tokens", "1")[0] == 0
    ids = running.backend.requests[-1].prompt_token_ids
    assert running.backend.tokenizer.decode(ids, skip_special_tokens=True) == "Q: 1 + 1\nA:"


def test_json(running, cli):
    _, out, err = cli("generate", "x", "--max-tokens", "3", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert "".join(line["choices"][0]["text"] for line in lines) == expected_text(running.backend.requests[-1])
    assert lines[-1]["usage"] == {"prompt_tokens": 2, "cached_prompt_tokens": 1, "completion_tokens": 3} and not err
    _, out, _ = cli("generate", "x", "--max-tokens", "3", "--json", "--no-stream")
    assert json.loads(out)["choices"][0]["finish_reason"] == "FINISH_REASON_LENGTH"
    _, out, _ = cli("adapters", "--json")
    assert [task["name"] for task in json.loads(out)["tasks"]] == list(TASKS)
    assert cli("health", "--json") == (0, '{"status": "SERVING"}\n', "")


def test_adapters_and_health_print_text(cli):
    status, out, _ = cli("adapters")
    digest = one_adapter().get("trio").digest
    parameters = one_adapter().get("trio").manifest.task("nlu").parameters
    assert status == 0 and f"trio: rank 8, base stand-in, digest {digest}" in out
    assert f"  nlu: {parameters:,} parameters, alpha 16, trained on top of math\n" in out
    assert cli("health") == (0, "SERVING\n", "")


def test_health_exits_with_1_if_the_server_is_not_serving(cli):
    with serving(warm=False) as loading:
        assert cli("health", server=loading.address) == (1, "NOT_SERVING\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["generate", "x", "--tasks", "art"], 2, "choose from: math, nlu, code"),
        (["generate", "x", "--top-p", "3"], 2, "sampling.top_p"),
        (["generate", "", "--no-stream"], 2, "prompt: is empty"),
        (["generate", "x", "--max-tokens", "-1"], 2, "max_tokens=-1"),
        (["generate", "x", "--adapter", "duo"], 2, "choose from: trio"),
        (["generate", "bad \udcff text"], 2, "surrogates"),
        (["adapters", "--tls-ca", "/nowhere/ca.pem"], 2, "/nowhere/ca.pem: No such file"),
    ],
)
def test_mistakes_exit_with_2_and_print_the_reason(cli, arguments, status, says):
    found, out, err = cli(*arguments)
    assert found == status and says in err and not out
    assert "Traceback" not in err


def test_no_server_ends_with_1(cli):
    status, out, err = cli("health", server="127.0.0.1:9")
    assert (status, out) == (1, "") and "no server can be reached at 127.0.0.1:9" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--tasks", "a", "--base"],
        ["generate", "x", "--tasks", "a:heavy"],
        ["generate", "x", "--tasks", "a,a"],
        ["generate", "x", "--timeout", "0"],
        ["frobnicate"],
        [],
    ],
)
def test_arguments_that_argparse_refuses_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        client_cli.main(arguments)
    assert error.value.code == 2
