"""vLLM's processes: a signal to the process group does not reach them, and they end if the service dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loraf_serve.vllm import naming, plugin
from loraf_serve.vllm.engine.environment import engine_environment
from tests.standins import make_model


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_group_signal_leaves_the_engine_alone_and_no_process_outlives_the_service(tmp_path: Path) -> None:
    model = make_model("mistral", tmp_path / "model")
    service = subprocess.Popen(
        [sys.executable, "-m", "tests.loraf_serve.engine_process", str(model)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    try:
        assert service.stdout is not None
        assert service.stdout.readline() == "answering\n"
        children = psutil.Process(service.pid).children(recursive=True)
        assert len(children) >= 2  # the engine core and a worker
        # One session, so that on a busy machine a waiting process yields to the one that it waits for.
        assert {os.getsid(child.pid) for child in children} == {service.pid}
        os.killpg(service.pid, signal.SIGTERM)
        os.killpg(service.pid, signal.SIGINT)
        assert service.stdout.readline() == "length\n"  # all 400 tokens, nothing was aborted
        service.kill()
        service.wait()
        assert until(lambda: not any(child.is_running() for child in children), 40)
    finally:
        service.kill()
        service.wait()
        for child in children:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize("owner", [None, str(os.getpid()), "1"], ids=["none", "this process", "another"])
def test_the_plugin_does_nothing_outside_an_engines_processes(monkeypatch: pytest.MonkeyPatch, owner) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plugin changed a process that does not belong to an engine")

    monkeypatch.setattr(os, "setpgid", forbidden)
    monkeypatch.setattr("threading.Thread", forbidden)
    monkeypatch.delenv(naming.ENGINE_OWNER, raising=False)
    if owner is not None:
        monkeypatch.setenv(naming.ENGINE_OWNER, owner)
    plugin.register()


def test_importing_the_plugin_imports_no_vllm() -> None:
    """vLLM calls it in every process of every user."""
    program = "import sys, loraf_serve.vllm.plugin as plugin; plugin.register(); "
    program += "sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = dict(os.environ)
    with engine_environment():
        assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ[naming.ENGINE_OWNER] == str(os.getpid())
    assert dict(os.environ) == before
