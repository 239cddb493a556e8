"""`loraf-serve check`: exit 0 or 2, every mistake at once, and nothing started."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from loraf.errors import ConfigError, CorruptCheckpoint
from loraf_serve import cli
from loraf_serve.adapters.adapter_spec import AdapterSpec, open_adapter
from loraf_serve.check import http, memory
from loraf_serve.check.report import NOT_CHECKED
from loraf_serve.http import page
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.vllm.http import facts
from tests.loraf_serve.damage import damaged, flip_a_bit
from tests.loraf_serve.harness import checkpoint_folder, model_folder
from tests.loraf_serve.http.stand import both_doors


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading the model's weights, or starting a backend, would fail."""

    def fail(*arguments, **named):
        raise AssertionError("a check loads no weights")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


def check(*options: str, backend: str = "merged", model: Path | str | None = None) -> int:
    model = str(model_folder() if model is None else model)
    return cli.main(["check", "--port", "0", "--backend", backend, "--model", model, *options])


def test_what_fits_is_described_and_the_status_is_0(capsys):
    assert check("--adapter", f"trio={checkpoint_folder()}", "--set", "careful=math:0.5") == 0
    out, err = capsys.readouterr()
    assert "loraf-serve" not in err and out.splitlines()[-1] == "fits"
    for part in (
        "MistralForCausalLM, float32, up to 1,024 tokens",
        "merged: requested by --backend",
        "trio: rank 8, digest",
        "named set careful = math:0.5 (from the operator)",
        "model weights (float32)",
        "adapter trio (A in float32)",
        "copies of the weights that they change",
        "127.0.0.1:0, no TLS, no tokens",
        *NOT_CHECKED,
    ):
        assert part in out


def test_json_has_the_same(capsys):
    assert check("--adapter", f"trio={checkpoint_folder()}", "--json", "--dtype", "bfloat16") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["fits"], content["problems"]) == (True, [])
    assert content["backend"] == {"name": "merged", "reason": "requested by --backend", "others": []}
    assert [adapter["tasks"] for adapter in content["adapters"]] == [["math", "nlu", "code"]]
    assert (content["memory"]["dtype"], content["memory"]["max_model_len"]) == ("bfloat16", 1024)
    for place in content["memory"]["places"]:
        uses = [use["nbytes"] for use in content["memory"]["uses"] if use["place"] == place["place"]]
        assert place["needed"] == sum(uses) <= place["free"]


def test_the_model_alone_can_be_checked(capsys):
    assert check() == 0
    assert "adapter" not in capsys.readouterr().out


def test_options_are_refused_all_at_once_with_status_2(capsys):
    options = ["--adapter", "a=/nowhere", "--set", "all=math", "--tls-key", "/k", "--max-queue", "0"]
    assert check(*options, model="/no/model") == 2
    out, err = capsys.readouterr()
    assert out == "does not fit\n"
    for part in (
        "/no/model",
        "--set all=math: 'all' is reserved",
        "--tls-cert: is missing",
        "--max-queue: 0 is out of",
    ):
        assert part in err
    assert check(*options, "--json", model="/no/model") == 2
    content = json.loads(capsys.readouterr().out)
    assert not content["fits"] and content["memory"] is None
    assert {"--max-queue", "--tls-cert", "--set all=math"} <= {problem["field"] for problem in content["problems"]}


def test_damage_memory_address_and_limit_are_reported_all_at_once(capsys, monkeypatch, tmp_path):
    folder = damaged(tmp_path, flip_a_bit)
    monkeypatch.setattr(memory, "free_main_memory", lambda: 1_000_000)
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, metrics_port, http_port = (str(listening.getsockname()[1]) for listening in taken)
        addresses = ("--port", port, "--metrics-port", metrics_port, "--http-port", http_port)
        assert check("--adapter", str(folder), "--adapter-memory", "1kB", *addresses) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "does not fit"
    with pytest.raises(CorruptCheckpoint) as at_start:
        open_adapter(AdapterSpec("ckpt", "ckpt", str(folder)), model_folder())
    for part in (
        *map(str, at_start.value.problems),
        "of main memory are missing",
        "most of it for model weights, and 1 MB are free → free some",
        "more than the 1 kB allowed",
        f"--host, --port: cannot listen on 127.0.0.1:{port} → choose another address",
        f"--host, --metrics-port: cannot listen on 127.0.0.1:{metrics_port}",
        f"--host, --http-port: cannot listen on 127.0.0.1:{http_port}",
    ):
        assert part in err


def test_options_of_the_backend_are_checked(capsys):
    assert check("--tensor-parallel-size", "2", "--max-model-len", "4096", backend="merged") == 2
    assert "--tensor-parallel-size: is not an option of the merged backend" in capsys.readouterr().err
    assert check("--max-model-len", "4096") == 2
    assert "--max-model-len: 4096 is out of range" in capsys.readouterr().err


def test_tls_files_and_sockets_are_checked(capsys, tmp_path):
    (tmp_path / "x.pem").write_text("nothing")
    assert check("--tls-cert", str(tmp_path / "x.pem"), "--tls-key", str(tmp_path / "x.pem")) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert check("--host", f"unix:{tmp_path}/s") == 0
    assert check("--host", f"unix:{tmp_path}/none/s") == 2
    assert "cannot listen on unix:" in capsys.readouterr().err


# --- HTTP


def test_the_http_door_is_described(capsys):
    options = ("--http-port", "0", "--http-allowed-origin", "https://app.example.org")
    assert check(*options) == 0
    expected = "http://127.0.0.1:0, OpenAI's API, for programs and its own page, https://app.example.org"
    assert expected in capsys.readouterr().out
    assert check(*options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["http"] == "http://127.0.0.1:0"
    assert check("--json") == 0
    assert json.loads(capsys.readouterr().out)["http"] is None


def test_ports_origins_and_options_of_http_are_checked(capsys):
    origins = (
        "https://app.example.org/",
        "*",
        "https://app.example.org:443",
        "http://app.example.org:80",
        "https://a:b",
    )
    options = [word for origin in origins for word in ("--http-allowed-origin", origin)]
    assert check("--port", "50123", "--http-port", "50123", *options) == 2
    err = capsys.readouterr().err
    assert "--http-port: 50123 is the port of gRPC" in err
    assert all(f"--http-allowed-origin: {origin!r} is not an origin" in err for origin in origins)
    assert check("--tool-call-parser", "hermes") == 2
    assert "--tool-call-parser: is about HTTP → give --http-port too" in capsys.readouterr().err


def test_a_page_with_missing_files_is_told_at_the_check_and_at_the_start(capsys, monkeypatch):
    files = dict(page._files())
    assert page.problems() == [] and {"index.html", "main.js", "sets.js"} <= files.keys()
    for name in ("sets.js", "style.css"):
        del files[name]
    monkeypatch.setattr(page, "_files", lambda: files)
    assert check("--http-port", "0") == 2
    err = capsys.readouterr().err
    assert all(f"--http-port: the page's file {name} is missing" in err for name in ("sets.js", "style.css"))
    assert check() == 0
    with pytest.raises(ConfigError, match=r"the page's file sets\.js is missing"), both_doors():
        pass
    monkeypatch.setattr(page, "_files", dict)
    assert [problem.message for problem in page.problems()] == ["the page's file index.html is missing"]


def test_what_vllms_app_needs_is_checked(monkeypatch):
    options = ServerOptions(http_port=0, tool_call_parser="hermes")
    assert http.problems(options, "merged") == http.problems(options, "resident") == []
    (unknown,) = http.problems(replace(options, tool_call_parser="nobody's"), "slots")
    assert unknown.field == "--tool-call-parser" and "hermes" in unknown.remedy
    monkeypatch.setitem(facts.FACTS, "water is wet", lambda: False)
    monkeypatch.setitem(sys.modules, "loraf_serve.vllm.http.app", None)
    broken, not_imported = http.problems(options, "resident")
    assert "water is wet" in broken.message and "cannot be imported" in not_imported.message
    assert broken.field == not_imported.field == "--http-port"


def test_the_same_content_under_two_names_is_counted_once(capsys):
    folder = checkpoint_folder()
    assert check("--adapter", f"a={folder}", "--adapter", f"b={folder}", "--json") == 0
    uses = [use["what"] for use in json.loads(capsys.readouterr().out)["memory"]["uses"]]
    assert uses.count("adapter a") == 2 and "adapter b" not in uses


def test_check_is_a_command_only_as_the_first_word(capsys):
    assert cli.main(["--model", str(model_folder()), "check"]) == 2
    assert "check: is not an option" in capsys.readouterr().err
