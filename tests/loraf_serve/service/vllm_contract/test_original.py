"""A client made from vLLM's own proto files, which are not in this repository, gets the answers of LoRAF's contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loraf_serve.asking import ask
from tests.loraf_serve.service.vllm_contract.stand import MODEL, speaking
from tests.packaging.building import ROOT, uv
from tests.tools import needs

FOLDER = os.environ.get("LORAF_VLLM_PROTO", "")
GENERATE = """
import os, sys, grpc_tools
from grpc_tools import protoc
well_known = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
options = [f"-I{sys.argv[1]}", f"-I{well_known}", f"--python_out={sys.argv[2]}", f"--grpc_python_out={sys.argv[2]}"]
sys.exit(protoc.main(["protoc", *options, "inference.proto", "control.proto"]))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    if not FOLDER:
        pytest.skip(needs("vLLM's proto files"))
    target = tmp_path_factory.mktemp("stubs")
    constraints = (ROOT / "build-constraints.txt").read_text(encoding="utf-8")
    [tools] = re.findall(r"^grpcio-tools==\S+$", constraints, re.MULTILINE)
    packages = ("--with", tools, "--with", "setuptools")
    uv("run", "--no-project", "--isolated", *packages, "python", "-c", GENERATE, FOLDER, target, cwd=target)
    return target


def calls(stubs: Path, address: str, requests: list) -> list:
    script = Path(__file__).with_name("original_client.py")
    command = [sys.executable, "-I", str(script), str(stubs), address]
    run = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_answers_tokens_and_refusals(stubs):
    options = {"output_token_ids": True, "prompt_token_ids": True, "output_logprobs": True}
    request = {"text": "hello", "lora_name": "trio@math:0.5+nlu", "response": options, "model": MODEL}
    with speaking() as stand:
        unary, stream, base, unknown, refused, info, listed, sleep = calls(
            stubs,
            stand.running.address,
            [
                ["Inference", "Generate", "GenerateRequest", request],
                ["Inference", "GenerateStream", "GenerateRequest", request],
                ["Inference", "Generate", "GenerateRequest", {"text": "hello"}],
                ["Inference", "Generate", "GenerateRequest", {"text": "hello", "lora_name": "nobody"}],
                ["Inference", "Generate", "GenerateRequest", {"text": "hello", "kv": {"cache_salt": "s"}}],
                ["Control", "GetServerInfo", "GetServerInfoRequest", {}],
                ["Control", "ListLoras", "ListLorasRequest", {}],
                ["Control", "Sleep", "SleepRequest", {}],
            ],
        )
        selected = ask("hello", tasks={"math": 0.5, "nlu": 1.0}, max_tokens=20)
        own = stand.running.generation.Generate(selected).choices[0]
        own_base = stand.running.generation.Generate(ask("hello", base=True, max_tokens=20)).choices[0]
    outputs = unary[0]["outputs"]
    assert (outputs["text"], outputs["token_ids"]) == (own.text, list(own.token_ids))
    assert len(outputs["logprobs"]) == 20 and outputs["finish_info"]["finish_reason"] == "LENGTH"
    assert [token for piece in stream[1:] for token in piece["outputs"]["token_ids"]] == list(own.token_ids)
    assert stream[0]["prompt_info"]["num_prompt_tokens"] == 6 and "outputs" not in stream[0]
    assert base[0]["outputs"]["text"] == own_base.text
    assert (unknown, refused, sleep) == ("NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    assert info[0]["api_version"] == "vllm"
    assert {"trio", "trio@math", "pair@code"} <= {adapter["lora_name"] for adapter in listed[0]["adapters"]}
