"""`loraf-client chat`, with lines from a pipe, against a real server with the fake backend."""

from __future__ import annotations

import io
import json
import sys

import pytest

from loraf_serve import client_cli
from loraf_train.data.forms.messages import conversation_of
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import serving


class WithoutChatTemplate(FakeBackend):
    """As a base model: Mistral-7B-v0.1 has no chat template."""

    def __init__(self):
        super().__init__()
        self.tokenizer.chat_template = None


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def base_model():
    with serving(WithoutChatTemplate) as server:
        yield server


@pytest.fixture
def chat(capsys, monkeypatch):
    """Holds a chat; returns exit status, the lines of standard output and those of standard error."""

    def run(server, *lines: str, options: tuple[str, ...] = ()) -> tuple[int, list[str], list[str]]:
        server.backend.requests.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = client_cli.main(["chat", "--server", server.address, "--max-tokens", "5", *options])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def prompts(server) -> list[str]:
    """What the model read, as text."""
    return [server.backend.tokenizer.decode(list(r.prompt_token_ids)) for r in server.backend.requests]


def sets(server) -> list[str]:
    return [str(request.task_set) for request in server.backend.requests]


def test_every_turn_is_sent_with_those_before_it(chat, running):
    status, out, err = chat(running, "Hello", "And now?", options=("--system", "Be brief."))
    first, second = running.backend.requests
    answer = expected_text(first)
    assert (status, out) == (0, [answer, expected_text(second)])
    assert prompts(running) == [
        "<s>system: Be brief.\nuser: Hello\nassistant: ",
        f"<s>system: Be brief.\nuser: Hello\nassistant: {answer}\nuser: And now?\nassistant: ",
    ]
    assert any("math+nlu+code" in line and "length" in line for line in err)


def test_the_set_changes_between_turns(chat, running):
    lines = ("a", "/tasks math:0.5+nlu", "b", "/tasks as_trained=nlu", "c", "/base", "d", "/tasks all", "e")
    status, _, _ = chat(running, *lines, options=("--tasks", "code"))
    assert status == 0
    assert sets(running) == ["code", "math:0.5+nlu", "math+nlu", "base", "math+nlu+code"]
    assert "user: a" in prompts(running)[-1]


def test_compare_asks_under_each_set_and_leaves_the_conversation_alone(chat, running):
    status, out, _ = chat(running, "a", "/compare math nlu base", "/compare math code -- other", "b")
    assert status == 0
    by_set = {str(r.task_set): r for r in running.backend.requests[1:4]}
    assert set(by_set) == {"math", "nlu", "base"}
    shown = "\n".join(out)
    assert all(f"== {name}\n{expected_text(request)}" in shown for name, request in by_set.items())
    texts = prompts(running)
    assert [text.count("user:") for text in texts] == [1, 1, 1, 1, 2, 2, 2]
    assert "user: other" in texts[4] and "user: other" not in texts[6]


def test_clear_and_save(chat, running, tmp_path):
    file = tmp_path / "chat.jsonl"
    status, out, _ = chat(running, "a", "/clear", "/tasks math", "b", "c", f"/save {file}", "d", f"/save {file}")
    assert status == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [m["content"] for m in record["messages"]] == ["b", out[1], "c", out[2], "d", out[3]]
    assert {a["tasks"] for a in record["answers"]} == {"math"} and len(record["answers"][0]["digest"]) == 64
    assert conversation_of(record).answers == [1, 3, 5]  # training learns from each of them


def test_a_file_of_something_else_is_not_overwritten(chat, running, tmp_path):
    file = tmp_path / "notes"
    file.write_text("mine")
    status, _, err = chat(running, f"/save {file}", "a", f"/save {file}", f"/save {tmp_path}/no/folder")
    assert status == 1 and file.read_text() == "mine"
    assert [line for line in err if "nothing to save" in line or "exists already" in line or "No such file" in line][2:]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/tasks maths", "there is no task 'maths' → choose from: math, nlu, code, all, base"),
        ("/tasks math:99", "is out of range"),
        ("/tasks as_trained=x", "there is no task 'x'"),
        ("/compare math", "there is no question yet"),
        ("/compare math -- ", "nothing stands after --"),
        ("/compare -- hello", "names no set"),
        ("/save", "lacks an argument → write /save FILE"),
        ("/base now", "takes no arguments"),
        ("/nothing", "there is no command /nothing"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(chat, running, line, says):
    status, out, err = chat(running, line, "hello")
    assert status == 1 and out == [expected_text(running.backend.requests[0])]
    assert len([text for text in err if says in text]) == 1


def test_what_the_server_refuses_is_one_line_and_not_remembered(chat, running):
    status, out, err = chat(running, "x" * 400, "hello")
    assert status == 1 and len(out) == 1
    assert len([text for text in err if "INVALID_ARGUMENT" in text and "messages" in text]) == 1
    assert prompts(running) == ["<s>user: hello\nassistant: "]


def test_a_value_out_of_range_is_told(chat, running):
    status, _, err = chat(running, "hello", options=("--temperature", "9"))
    assert status == 1 and any("temperature" in line for line in err)


def test_a_question_may_begin_with_the_sign_of_commands(chat, running):
    assert chat(running, "//etc", "a\\", "b")[0] == 0
    assert "user: /etc\n" in prompts(running)[0] and prompts(running)[1].endswith("user: a\nb\nassistant: ")


def test_help_names_every_command(chat, running):
    from loraf_serve.chat.commands import COMMANDS

    _, _, err = chat(running, "/help", "/quit", "not asked")
    assert all(any(line.startswith(command.usage) for line in err) for command in COMMANDS)
    assert not running.backend.requests


def test_without_a_chat_template_a_task_answers_in_its_own(chat, base_model):
    status, out, err = chat(base_model, "/tasks math", "7", "8", "/tasks as_trained=math", "9")
    assert status == 0 and len(out) == 3
    assert prompts(base_model) == ["<s>Q: 7\nA:", "<s>Q: 8\nA:", "<s>Q: 9\nA:"]
    assert len([line for line in err if "in the template of its task" in line]) == 3


@pytest.mark.parametrize("chosen", ["math+nlu", "base", "nlu", "code"])
def test_without_any_template_the_prompt_is_sent_as_it_is_and_this_is_said(chat, base_model, chosen):
    """Several tasks, none, and tasks whose template has not exactly one field."""
    status, out, err = chat(base_model, f"/tasks {chosen}", "one", "two")
    assert status == 0 and len(out) == 2 and prompts(base_model) == ["<s>one", "<s>two"]
    assert len([line for line in err if "without earlier turns and instructions, as a plain prompt" in line]) == 2


def test_without_a_chat_template_sets_are_compared_each_in_its_form(chat, base_model):
    status, _, err = chat(base_model, "/compare math base -- hi")
    assert status == 0 and sorted(prompts(base_model)) == ["<s>Q: hi\nA:", "<s>hi"]
    assert any(line.startswith("math: the model has no chat template") for line in err)


def test_a_server_that_is_not_there_ends_the_chat(capsys):
    assert client_cli.main(["chat", "--server", "127.0.0.1:1", "--retries", "0"]) == 1
    assert "no server can be reached" in capsys.readouterr().err


def test_the_set_to_begin_with_must_exist(chat, running):
    status, _, err = chat(running, options=("--tasks", "nothing"))
    assert status == 2 and any("there is no task 'nothing'" in line for line in err)


def test_the_chat_goes_on_after_a_failure_of_the_server(chat):
    backend = FakeBackend()
    with serving(backend) as server:
        backend.failure_after = RuntimeError("secret")
        status, _, err = chat(server, "a", options=("--retries", "0"))
        assert status == 1 and any(line.startswith("INTERNAL") and "request" in line for line in err)
        assert "secret" not in "".join(err)
        backend.failure_after = None
        assert chat(server, "b")[0] == 0


def test_a_token_that_may_not_use_every_task_begins_with_those_that_it_may(chat, tmp_path):
    token, file = "some-0123456789abcdef", tmp_path / "tokens"
    file.write_text(f"{token} tasks=math,nlu")
    token_file = tmp_path / "token"
    token_file.write_text(token)
    with serving(token_file=file) as server:
        status, out, err = chat(server, "Hello", "And now?", options=("--token-file", str(token_file)))
        assert (status, sets(server)) == (0, ["math+nlu", "math+nlu"]) and len(out) == 2
        assert sum("may not use every task: math+nlu answers" in line for line in err) == 1
        refused = ((("--tasks", "all"), ("Hello",)), ((), ("/tasks all", "Hello")), (("--priority", "1"), ("Hello",)))
        for options, lines in refused:
            status, out, err = chat(server, *lines, options=("--token-file", str(token_file), *options))
            assert status == 1 and not out and any("PERMISSION_DENIED" in line for line in err)
            assert not any("every task" in line for line in err)  # what was asked for stays
