"""The pages about clients: their code runs as it stands, against a server with the fake backend."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import google.rpc
import pytest

from tests.docs.pages import ROOT, blocks
from tests.loraf_serve.client.stand_in import StandIn, standing_in
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, serving
from tests.tools import needs

ADDRESS = "127.0.0.1:50051"
PYTHON, OTHERS = "how-to/python-client.md", "how-to/other-languages.md"


def code(page: str, language: str) -> list[str]:
    return [block.text for block in blocks(language) if block.page == ROOT / "docs" / page]


def run_cells(cells: list[str], address: str) -> None:
    """Runs code as one program."""
    exec(compile("\n".join(cells).replace(ADDRESS, address), "<page>", "exec"), {})


def test_the_python_page_runs(monkeypatch):
    monkeypatch.setenv("LORAF_TOKEN", "of-the-page")
    cells = code(PYTHON, "python")
    with standing_in() as (server, address):
        run_cells(cells, address)
    assert_used(server, len(cells))


def assert_used(server: StandIn, cells: int) -> None:
    """Every kind of call of the page has arrived, and the token with the last client's."""
    assert cells >= 7
    assert {"Generate", "StreamGenerate", "GetServerInfo", "Check"} <= {a.method for a in server.attempts}
    forms = [a.request.sampling.structured_output for a in server.attempts if a.method == "Generate"]
    assert any("inhabitants" in form.json_schema for form in forms)


def test_the_errors_of_the_python_page(capsys):
    cells = code(PYTHON, "python")
    (errors,) = [cell for cell in cells if "except InvalidArgument" in cell]
    with serving() as running:
        run_cells([cells[0], errors], running.address)
    out = capsys.readouterr().out
    assert "sampling.top_p 3 is out of range" in out


@pytest.fixture
def node_folder(tmp_path) -> Path:
    """A folder as the page describes it, with the page's script."""
    packages = ROOT / ".tools" / "grpc-js" / "node_modules"
    if not shutil.which("node") or not packages.is_dir():
        pytest.skip(needs("grpc-js"))
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    (tmp_path / "googleapis").symlink_to(Path(next(iter(google.rpc.__path__))).parents[1])
    (tmp_path / "node_modules").symlink_to(packages)
    (script,) = code(OTHERS, "js")
    (tmp_path / "client.js").write_text(script, encoding="utf-8")
    return tmp_path


def test_nodes_client_streams_reads_details_and_cancels(node_folder):
    with serving(FakeBackend(seconds_per_token=0.02)) as running:
        node = subprocess.run(
            ["node", "client.js", running.address], cwd=node_folder, capture_output=True, text=True, timeout=60
        )
        whole, cancelled = running.backend.requests
        assert node.stdout.splitlines() == [
            f"text: {expected_text(whole)}",
            "INVALID_ARGUMENT [ 'prompt' ]",
            "CANCELLED",
        ], node.stderr
        assert str(whole.task_set) == "math" and node.returncode == 0
        assert eventually(lambda: not running.backend.running)
        assert running.backend.closed_early == [cancelled.request_id]


def buf_curl(block: str, address: str, token: str = "") -> list[subprocess.CompletedProcess[str]]:
    """Runs the commands of a block."""
    buf = ROOT / ".tools" / "buf"
    if not buf.exists():
        pytest.skip(needs("buf"))
    runs = []
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line.replace(ADDRESS, address).replace("$LORAF_TOKEN", token))
        assert program == "buf"
        runs.append(subprocess.run([str(buf), *arguments], capture_output=True, text=True, timeout=60))
    return runs


def test_buf_curl_needs_nothing_but_reflection():
    with serving(reflection=True) as running:
        runs = buf_curl(code(OTHERS, "sh")[0], running.address)
        assert [run.returncode for run in runs] == [0, 0, 0], runs
        methods, adapters, answer = (run.stdout for run in runs)
        assert "loraf.v1.GenerationService/StreamGenerate" in methods.splitlines()
        assert '"name": "trio"' in adapters
        assert expected_text(running.backend.requests[-1])[0] in answer and "FINISH_REASON_LENGTH" in answer


def test_buf_curl_sends_a_token(tmp_path):
    (tmp_path / "tokens").write_text("token-of-the-page-0\n")
    with serving(reflection=True, token_file=tmp_path / "tokens") as running:
        (listed,) = buf_curl(code(OTHERS, "sh")[1], running.address, "token-of-the-page-0")
        assert listed.returncode == 0 and '"name": "trio"' in listed.stdout, listed.stderr
        (refused,) = buf_curl(code(OTHERS, "sh")[1], running.address, "another-token-000000")
        assert refused.returncode != 0 and not refused.stdout
