"""From sources to a served answer: the wheel, built from the source distribution, in a fresh environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.packaging.building import ROOT, uv

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

GOLDEN = ROOT / "tests" / "golden"

ASK = """
import json, sys
import loraf
from loraf.matrices import native
from loraf_serve.launch import launch

checkpoint, selection = sys.argv[1], json.loads(sys.argv[2])
with launch("tiny", checkpoint, options=("--dtype", "float32")) as server:
    options = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True}
    answer = server.client.generate("Shout: garden\\n", tasks=selection, **options)
    backend = answer.response.served_by.backend
    print(json.dumps([loraf.__file__, native.why_not(), backend, list(answer.token_ids)]))
"""


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The executables of a fresh environment with the wheel and its dependencies: no vLLM, no development tools."""
    folder = tmp_path_factory.mktemp("installation")
    uv("venv", "--python", sys.executable, folder / "venv", cwd=folder)
    executables = folder / "venv" / "bin"
    same_torch = f"torch=={metadata.version('torch')}"
    constraints = ("--constraints", ROOT / "constraints.txt")
    uv("pip", "install", "--python", executables / "python", *constraints, wheel, same_torch, cwd=folder)
    return executables


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that knows nothing of this checkout or its environment."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_training_command_shows_its_help(environment, tmp_path):
    assert "usage: loraf-train" in run(environment / "loraf-train", "--help", cwd=tmp_path)


def test_a_task_set_gets_its_golden_answer(environment, tmp_path):
    answers = json.loads((GOLDEN / "answers.json").read_text())
    checkpoint = GOLDEN / "checkpoint" / "ckpt"
    selection = json.dumps(answers["sets"]["first"])
    output = run(environment / "python", "-c", ASK, checkpoint, selection, cwd=tmp_path)
    package, why_not_native, backend, token_ids = json.loads(output.splitlines()[-1])
    assert Path(package).is_relative_to(environment.parent) and why_not_native is None
    assert backend == "merged"  # without vLLM, `--backend auto` takes it
    assert token_ids == answers["greedy"]["first"]["shout"]


def test_the_environment_has_neither_vllm_nor_development_tools(environment, tmp_path):
    code = "import importlib.util; print([m for m in ('vllm', 'pytest', 'grpc_tools') if importlib.util.find_spec(m)])"
    assert run(environment / "python", "-c", code, cwd=tmp_path) == "[]\n"
