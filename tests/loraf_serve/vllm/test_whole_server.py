"""`loraf-serve` as an operator runs it, on a real engine: tokens, metrics, and what is left when the engine dies."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from loraf_serve.client import Client, ServiceError
from loraf_serve.launch import launch
from tests.loraf_serve.harness import eventually
from tests.loraf_serve.vllm_engines import COMMON
from tests.standins import make_model, random_checkpoint

TOKEN = "operator-0123456789abcdef"
LONG = 1 << 16  # tokens; more than a minute at a millisecond each


def test_tokens_metrics_and_the_death_of_the_engine(tmp_path: Path) -> None:
    # So long that no answer is complete when the engine dies: this process may not run for a second while it makes one.
    model = make_model("mistral", tmp_path / "model", context=LONG)
    random_checkpoint(tmp_path / "ckpt", model)
    (tmp_path / "tokens").write_text(f"{TOKEN} name=operator\n")
    (tmp_path / "tokens").chmod(0o600)
    options = ("--backend", "resident", "--token-file", str(tmp_path / "tokens"), "--metrics-port", "0")
    options += (*COMMON, "--enforce-eager")
    with (
        launch(str(model), f"a={tmp_path / 'ckpt'}", options=options, client={"token": TOKEN, "retries": 0}) as server,
        Client(server.address, retries=0) as stranger,
    ):
        with pytest.raises(ServiceError, match="UNAUTHENTICATED"):
            stranger.generate("x")
        assert len(server.client.generate(prompt_token_ids=[1, 5], max_tokens=4, ignore_eos=True).token_ids) == 4

        address = next(line for line in server.log if "metrics on" in line).split()[-1]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address)
        assert refused.value.code == 401
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
        text = urllib.request.urlopen(request).read().decode()
        assert "loraf_requests_total{" in text and "vllm:" in text and "lora_requests_info" not in text

        stream = server.client.stream(prompt_token_ids=[1, 5], max_tokens=LONG - 2, ignore_eos=True)
        next(stream)
        process = psutil.Process(server._process.pid)
        family = process.children(recursive=True)
        assert len(family) >= 2  # the engine core and a worker
        died = time.monotonic()
        family[-1].send_signal(signal.SIGKILL)
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            list(stream)
        # Either health says so, or the process has said it and is gone already.
        assert eventually(lambda: health(stranger) != "SERVING", 2 - (time.monotonic() - died))
        assert server._process.wait(30) == 1
        assert eventually(lambda: not any(child.is_running() for child in family), 30)


def health(client: Client) -> str:
    try:
        return client.health(timeout=1)
    except ServiceError as error:
        return error.code
