"""`loraf-client`: tokens, waiting, server information, structured output. `test_client.py` has the rest."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from loraf_serve import client_cli
from tests.loraf_serve.client.stand_in import INFO, Refusal, standing_in
from tests.loraf_serve.harness import one_adapter, serving

TOKEN = "token-of-the-shell"


@pytest.fixture
def cli(capsys):
    """Runs `loraf-client`; returns exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return client_cli.main(list(arguments)), *capsys.readouterr()

    return run


def sent(server) -> str | None:
    return server.attempts[-1].metadata.get("authorization")


# --- tokens


def test_the_token_comes_from_a_file_or_the_environment(cli, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with standing_in() as (server, address):
        assert cli("adapters", "--server", address)[0] == 0 and sent(server) is None
        assert cli("adapters", "--server", address, "--token-file", str(file))[0] == 0
        assert sent(server) == f"Bearer {TOKEN}"
        monkeypatch.setenv("LORAF_TOKEN", "of-the-environment")
        assert cli("health", "--server", address)[0] == 0 and sent(server) == "Bearer of-the-environment"
        assert cli("health", "--server", address, "--token-file", str(file))[0] == 0
        assert sent(server) == f"Bearer {TOKEN}"
        monkeypatch.setenv("LORAF_TOKEN", "")
        assert cli("health", "--server", address)[0] == 0 and sent(server) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "--token-file: holds 0 words instead of a token"),
        (TOKEN.encode() + b" load priority", "--token-file: holds 3 words instead of a token"),
        (b"t\xff", "--token-file: is not text in UTF-8"),
        (b"a,b", "has characters that a bearer token cannot have"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_without_one_token_is_refused(cli, tmp_path, content, says):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    status, out, err = cli("health", "--token-file", str(file))
    assert (status, out) == (2, "") and says in err and "Traceback" not in err and TOKEN not in err


def test_a_token_does_not_leave_the_machine_unencrypted(cli, monkeypatch):
    monkeypatch.setenv("LORAF_TOKEN", TOKEN)
    status, _, err = cli("adapters", "--server", "10.255.255.1:50051")
    assert status == 2 and "unencrypted; connect over TLS" in err and TOKEN not in err
    status, _, err = cli("adapters", "--server", "10.255.255.1:50051", "--insecure-token", "--timeout", "0.2")
    assert status == 1 and "unencrypted" not in err


def test_there_is_no_option_for_the_token_itself():
    (subparsers,) = client_cli.parser()._subparsers._group_actions
    for command in subparsers.choices.values():
        assert "--token" not in command._option_string_actions


# --- waiting


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_health_waits_for_a_server_that_does_not_listen_yet(cli):
    one_adapter()
    port, status = free_port(), []
    waiting = threading.Thread(
        target=lambda: status.append(
            client_cli.main(["health", "--wait", "20", "--server", f"127.0.0.1:{port}", "--json"])
        )
    )
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    with serving(port=port, warm=False) as running:
        time.sleep(0.5)
        assert waiting.is_alive()
        running.call(running.server.warm_up())
        waiting.join(10)
    assert status == [0]


def test_health_stops_waiting_and_says_why(cli):
    began = time.monotonic()
    status, out, err = cli("health", "--wait", "0.3", "--server", f"127.0.0.1:{free_port()}")
    assert (status, out) == (1, "") and "not serving within 0.3 s: no server can be reached at" in err
    with serving(warm=False) as loading:
        status, out, err = cli("health", "--wait", "0.3", "--server", loading.address)
        assert (status, out) == (1, "") and "DEADLINE_EXCEEDED: not serving within 0.3 s: NOT_SERVING" in err
    assert time.monotonic() - began < 10


def test_health_does_not_wait_for_what_cannot_change(cli):
    import grpc

    with standing_in(Refusal(grpc.StatusCode.UNIMPLEMENTED)) as (_, address):
        status, _, err = cli("health", "--wait", "60", "--server", address)
        assert status == 1 and "UNIMPLEMENTED" in err


def test_waiting_without_a_number_has_a_limit():
    assert client_cli.parser().parse_args(["health", "--wait"]).wait == client_cli.DEFAULT_WAIT
    assert client_cli.parser().parse_args(["health"]).wait is None


# --- server information, structured output, retries


def test_info(cli):
    with standing_in() as (_, address):
        status, out, err = cli("info", "--server", address)
        assert (status, err) == (0, "")
        assert [" ".join(line.split()) for line in out.splitlines()] == [
            "model tiny",
            "backend resident",
            "versions loraf 1.0, torch 2.8",
            "unsupported fields sampling.structured_output",
            "max_model_len 256 (tokens of <prompt> and answer)",
        ]
        assert json.loads(cli("info", "--server", address, "--json")[1])["limits"][0]["name"] == INFO.limits[0].name


def test_structured_output(cli, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    forms = {
        ("--json-schema", str(schema)): ("json_schema", '{"type": "object"}'),
        ("--regex", "a+"): ("regex", "a+"),
        ("--choice", "yes", "--choice", "no"): ("choice", ["yes", "no"]),
    }
    with standing_in() as (server, address):
        for options, (name, value) in forms.items():
            assert cli("generate", "x", "--no-stream", "--server", address, *options)[0] == 0
            form = server.attempts[-1].request.sampling.structured_output
            sent_value = getattr(form, name)
            assert form.WhichOneof("form") == name and value == (sent_value.texts if name == "choice" else sent_value)
        assert cli("generate", "x", "--server", address)[0] == 0
        assert not server.attempts[-1].request.sampling.HasField("structured_output")


def test_chat_tools_and_priority(cli, tmp_path):
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": function}]))
    with standing_in() as (server, address):
        assert cli("generate", "x", "--server", address, "--tools", str(file), "--priority", "-3")[0] == 0
        request = server.attempts[-1].request
        assert (request.priority, request.tools[0].name, request.messages.messages[0].content) == (-3, "add", "x")
        assert json.loads(request.tools[0].parameters) == {"type": "object"}
        assert cli("generate", "x", "--server", address, "--chat")[0] == 0
        request = server.attempts[-1].request
        assert request.messages.messages[0].role == "user" and not request.tools and not request.HasField("priority")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1]"])
def test_a_file_without_tools_is_refused(cli, tmp_path, content):
    file = tmp_path / "tools.json"
    file.write_text(content)
    status, _, err = cli("generate", "x", "--tools", str(file))
    assert status == 2 and f"{file}: --tools: is not" in err and "→ write [" in err and "Traceback" not in err


def test_mistakes_in_options(cli, capsys):
    status, _, err = cli("generate", "x", "--json-schema", "/nowhere/schema.json")
    assert status == 2 and "/nowhere/schema.json: No such file" in err
    status, _, err = cli("generate", "x", "--retries", "9")
    assert status == 2 and "retries=9 is out of range; use 0 to 4" in err
    with pytest.raises(SystemExit) as error:
        cli("generate", "x", "--regex", "a", "--choice", "b")
    assert error.value.code == 2


def test_retries(cli):
    with standing_in(Refusal()) as (server, address):
        assert cli("adapters", "--server", address, "--retries", "0")[0] == 1
        assert len(server.attempts) == 1
