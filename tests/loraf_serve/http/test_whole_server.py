"""`loraf-serve --http-port` as an operator runs it, and the page of the docs as its readers do."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess

import httpx
import openai
import pytest

from loraf_serve import cli
from loraf_serve.http import asked
from loraf_serve.launch import launch
from tests.docs.pages import ROOT
from tests.loraf_serve.harness import checkpoint_folder, model_folder
from tests.loraf_serve.http.stand import both_doors

PAGE = (ROOT / "docs" / "how-to" / "openai-api.md").read_text(encoding="utf-8")
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server():
    options = ("--backend", "merged", "--dtype", "float32", "--http-port", "0", "--set", "support=math+nlu:0.5")
    with launch(str(model_folder()), f"ckpt={checkpoint_folder()}", options=options) as running:
        yield running
        assert running.stop() == 0  # both doors drain


def test_both_doors_are_announced_and_answer(server):
    assert server.http and server.address
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="ckpt@support", prompt="Hello", max_tokens=5, temperature=0)
    assert answer.choices[0].text == server.client.generate("Hello", named="support", max_tokens=5, temperature=0).text
    assert answer.system_fingerprint.endswith(":math+nlu:0.5")
    assert {"base", "ckpt", "ckpt@support"} <= {model.id for model in client.models.list()}
    assert httpx.get(server.http).status_code == 200


def test_the_examples_of_the_docs_run(server):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(blocks).replace(HERE, server.http), {})
    assert "loraf:" in printed.getvalue()
    (curl,) = re.findall(r"```sh\n(curl .*?)```", PAGE, re.DOTALL)
    run = subprocess.run(["sh", "-c", curl.replace(HERE, server.http)], capture_output=True, text=True, timeout=60)
    assert '"object": "text_completion"' in run.stdout, run.stderr


def test_the_reference_leaves_no_field_and_no_route_out():
    text = (ROOT / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
    obeyed = {*asked._BEYOND, *asked._BEYOND_CHAT, *asked._FOR_APP, "max_tokens", "prompt", "apply_task_template"}
    assert [name for name in sorted(obeyed) if f"`{name}`" not in text] == []
    with both_doors(warm=False) as both:
        paths = [route.path.replace("{model}", "NAME") for route in both.door._routes()._routes]
    for path in paths:
        assert path.replace("{name}", "NAME").replace("{file}", "FILE") in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--http-port", "70000"], "--http-port"),
        (["--http-port", "50051"], "--http-port"),
        (["--http-port", "9", "--metrics-port", "9"], "--http-port"),
        (["--http-port", "0", "--http-allowed-origin", "example.org"], "--http-allowed-origin"),
        (["--http-port", "0", "--http-allowed-origin", "https://example.org/path"], "--http-allowed-origin"),
        (["--http-allowed-origin", "https://example.org"], "--http-allowed-origin"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser"),
    ],
)
def test_options_that_cannot_be_used(options, named, capsys):
    assert cli.main(["--model", str(model_folder()), *options]) == 2
    assert named in capsys.readouterr().err
