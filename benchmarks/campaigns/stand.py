"""A model, checkpoints, and a server for them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).parents[2]
KINDS = ("fake", "resident", "merged")
TASKS = ("math", "nlu", "code")
TEMPLATES = {"math": "Q: {question}\nA:", "nlu": "{instruction} / {input}", "code": "no field"}
RANK = 8
ADAPTERS = {"trio": "trio", "pair": "pair"}  # name → folder below the root
SETS = ("trio/both=math+nlu:0.5",)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool['function']['name'] }}\n{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['reasoning_content'] }}{{ m['content'] }}{{ m['tool_call_id'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENGINE_OPTIONS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager")


def make_stand(folder: Path) -> None:
    """Makes a random model of two layers, a checkpoint of three tasks, and one of two."""
    from tests.standins import byte_tokenizer, make_model

    model = make_model("mistral", folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    make_checkpoint(folder / "checkpoints" / "trio", model, TASKS, 0)
    make_checkpoint(folder / "checkpoints" / "pair", model, TASKS[1:], 1)


def make_checkpoint(folder: Path, model: Path, tasks: Sequence[str], seed: int) -> None:
    """Makes a random checkpoint; each task was trained with those before it active."""
    from loraf.base_model import describe
    from loraf.checkpoint import Checkpoint
    from loraf.manifest import Templates
    from tests.standins import linear_shapes, random_values

    shapes = linear_shapes(model)
    checkpoint = Checkpoint.create(folder, describe("stand-in", model), RANK, shapes, seed)
    values = random_values(shapes, RANK, tasks, 0.75, seed)
    for i, task in enumerate(tasks):
        template = Templates(TEMPLATES[task])
        checkpoint.add_task(task, values[task], alpha=16.0, sparsity=0.75, trained_with=tasks[:i], templates=template)


class LookedInto(Protocol):
    """A server that a campaign calls and looks into."""

    address: str

    def state(self) -> dict[str, int]: ...


class CampaignServer:
    """A server in a process of its own.

    Args:
        kind: one of KINDS.
        folder: of `make_stand`, or another with `model` and `checkpoints` in it.
        engine_options: vLLM's, for `resident`.
        server_options: fields of ServerOptions.
        log: file for what the server prints; None for this process's own error output.

    Attributes:
        address: host:port.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        engine_options: Sequence[str] = ENGINE_OPTIONS,
        seconds_per_token: float = 0.0,
        adapters: Mapping[str, str] | None = None,
        sets: Sequence[str] = SETS,
        rank: int = RANK,
        log: Path | None = None,
        **server_options: Any,
    ):
        config = {
            "kind": kind,
            "model": str(folder / "model"),
            "root": str(folder / "checkpoints"),
            "adapters": dict(ADAPTERS if adapters is None else adapters),
            "sets": list(sets),
            "rank": rank,
            "engine_options": list(engine_options),
            "seconds_per_token": seconds_per_token,
            "chat_template": CHAT_TEMPLATE,
            "server_options": server_options,
        }
        self._lock = threading.Lock()
        command = [sys.executable, "-m", "benchmarks.campaigns.server", json.dumps(config)]
        with open(log or os.devnull, "wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors if log else None,
                text=True,
                start_new_session=True,
            )
        try:
            self.address = f"127.0.0.1:{self._answer()['port']}"
        except BaseException:
            self.kill()
            raise

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the campaign's server has ended, with status {self._process.wait(30)}")
        return json.loads(line)

    def do(self, **command: Any) -> Any:
        """Gives a command of server.py. Returns the answer."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def state(self) -> dict[str, int]:
        """What is unfinished where, all 0 if nothing runs."""
        state: dict[str, int] = self.do(do="state")
        return state

    def memory(self) -> dict[str, int]:
        """Bytes of all the server's processes together: resident, and those that no other process shares."""
        main = psutil.Process(self._process.pid)
        total = {"resident": 0, "unshared": 0}
        for process in (main, *main.children(recursive=True)):
            try:
                info = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            total["resident"] += info.rss
            total["unshared"] += info.uss
        return total

    def kill(self) -> None:
        """Ends the server and its children at once."""
        try:
            processes = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        self._process.kill()
        self._process.wait()
        for process in processes:
            if process.is_running():
                process.kill()

    def __enter__(self) -> CampaignServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.do(do="stop")
            self._process.wait(60)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            if error is None:
                raise
        finally:
            self.kill()


@contextmanager
def campaign_server(kind: str, **options: Any) -> Iterator[CampaignServer]:
    """A server with the usual stand, in a temporary folder. Takes the options of CampaignServer."""
    with tempfile.TemporaryDirectory(prefix="loraf-campaign-") as folder:
        make_stand(Path(folder))
        with CampaignServer(kind, Path(folder), **options) as server:
            yield server
