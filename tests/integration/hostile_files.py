"""Changes checkpoints and foreign adapters at random, with digests that fit, and gives them to everything that reads.

    python -m tests.integration.hostile_files CASES [SEED]      prints one line of JSON; exit status 1 if a case failed

Every reader must succeed or raise the project's own error, within MEMORY and SECONDS.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import LorafError
from loraf.peft_export import export_peft
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder, read_values
from loraf_serve.service import messages
from loraf_train.cli import main
from tests import standins
from tests.loraf.hostile_changes import change, header_change, text_change
from tests.loraf.small_checkpoints import rewrite_bytes, task_file
from tests.loraf.small_manifests import signed

MEMORY = 1 << 30  # bytes that a reader may take in addition, for files of some kilobytes
SECONDS = 20
TASKS = ("math", "nlu")
TRAINING = {
    "settings": {
        "alpha": 16.0,
        "calibration": {"steps": 4, "optimizer": "adamw"},
        "training": {"learning_rate": 1e-4, "epochs": 3, "dropout": 0.1},
        "data": {"prompt": None, "train": [{"file": "a.jsonl"}, {"dataset": "org/data", "split": "train"}]},
    },
    "examples": 7,
    "steps": 21,
    "loss": {"first": 2.0, "last": 0.5},
    "imported": {"from": "peft", "source": "lora", "taken_over": False, "error": 0.001},
}
SCORE = {"set": "math", "evaluation": "gsm8k", "metric": "exact", "score": 0.5, "count": 200}


class World:
    """A model, a checkpoint and a PEFT adapter to change."""

    def __init__(self, folder: Path):
        self.model = standins.make_model("llama", folder / "model")
        self.checkpoint, self.lora, self.into = folder / "ckpt", folder / "lora", folder / "into"
        made = standins.random_checkpoint(self.checkpoint, self.model, TASKS, rank=4)
        for task in TASKS:
            made.set_scores(task, [SCORE, SCORE | {"set": "math+nlu"}])
        content = json.loads((self.checkpoint / manifests.FILE_NAME).read_bytes())
        for task in content["tasks"]:
            task["training"] = copy.deepcopy(TRAINING)
        (self.checkpoint / manifests.FILE_NAME).write_bytes(signed(content))
        opened = Checkpoint.open(self.checkpoint)
        export_peft(opened, opened.manifest.all_tasks(), self.lora)
        config = json.loads((self.lora / "adapter_config.json").read_text())
        config |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r".*\.layers\.0\..*": 4}, "use_rslora": False}
        (self.lora / "adapter_config.json").write_text(json.dumps(config))
        standins.random_checkpoint(self.into, self.model, (), rank=4)
        self.content: dict[str, Any] = json.loads((self.checkpoint / manifests.FILE_NAME).read_bytes())


# --- who reads -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> None:
    """Runs a command of loraf-train: status 0 or 2, or it raises."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(arguments)
    assert status in (0, 2), status


def readers(world: World, checkpoint: Path, lora: Path, scratch: Path) -> dict[str, Callable[[], None]]:
    def served() -> None:
        folder = CheckpointFolder.read(checkpoint)
        folder.require_servable(world.model, allow_other_base=True)
        adapter = read_values(folder.served_as("x"))
        messages.adapter(adapter, adapter.resident_bytes).SerializeToString()

    def listed() -> None:
        messages.adapter(CheckpointFolder.read(checkpoint).served_as("x"), 0).SerializeToString()

    def streamed() -> None:
        with CheckpointStream.open(checkpoint) as stream:
            stream.finish()

    def written() -> None:
        shutil.copytree(checkpoint, scratch / "written")
        opened = Checkpoint.open(scratch / "written")
        opened.set_scores(opened.manifest.task_names[0], [SCORE]) if opened.manifest.tasks else None

    ckpt = str(checkpoint)
    into = ("--into", str(scratch / "into"), "--name", "new", "--allow-other-base", "--allow-lossy")
    return {
        "inspect": lambda: command("inspect", ckpt),
        "inspect --layers": lambda: command("inspect", ckpt, "--layers"),
        "inspect --json": lambda: command("inspect", ckpt, "--json"),
        "inspect --verify": lambda: command("inspect", ckpt, "--verify"),
        "card": lambda: command("card", ckpt),
        "export": lambda: command("export", ckpt, "--tasks", "all", "--format", "peft", "--out", str(scratch / "out")),
        "remove": lambda: command("remove", ckpt, "math", "--dry-run"),
        "import": lambda: command("import", ckpt, "--tasks", "math,nlu", *into),
        "import PEFT": lambda: command("import", str(lora), *into),
        "ListAdapters": listed,
        "load": served,
        "stream": streamed,
        "write": written,
    }


class TooLong(Exception):
    """A reader took more than SECONDS."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLong


def campaign(cases: int, number: int = 0) -> dict[str, Any]:
    """Runs every reader on `cases` changed files. Returns what happened, with the failures."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name))
        for read in readers(world, world.checkpoint, world.lora, _scratch(world, Path(name) / "warm")).values():
            read()  # so that imports count neither as time nor as memory
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MEMORY, resource.RLIM_INFINITY))
        before = _resident()
        signal.signal(signal.SIGALRM, _too_long)

        def one_case(chance: random.Random, folder: Path) -> None:
            checkpoint, lora = folder / "ckpt", folder / "lora"
            shutil.copytree(world.checkpoint, checkpoint)
            shutil.copytree(world.lora, lora)
            kind = chance.choice(["manifest"] * 5 + ["text", "task file", "lora config", "lora config", "lora file"])
            if kind == "manifest":
                content = copy.deepcopy(world.content)
                for _ in range(chance.randint(1, 3)):
                    change(chance, content)
                (checkpoint / manifests.FILE_NAME).write_bytes(signed(content))
            elif kind == "text":
                data = (checkpoint / manifests.FILE_NAME).read_bytes()
                (checkpoint / manifests.FILE_NAME).write_bytes(text_change(chance, data))
            elif kind == "task file":
                rewrite_bytes(checkpoint, "math", header_change(chance, task_file(checkpoint, "math").read_bytes()))
            elif kind == "lora config":
                content = json.loads((lora / "adapter_config.json").read_bytes())
                for _ in range(chance.randint(1, 2)):
                    change(chance, content)
                (lora / "adapter_config.json").write_text(json.dumps(content))
            else:
                file = lora / "adapter_model.safetensors"
                file.write_bytes(header_change(chance, file.read_bytes()))
            chosen = readers(world, checkpoint, lora, _scratch(world, folder))
            if kind.startswith("lora"):
                chosen = {"import PEFT": chosen["import PEFT"]}
            else:
                del chosen["import PEFT"]
            for reader, read in chosen.items():
                outcomes[attempt(reader, read)] += 1

        def attempt(reader: str, read: Callable[[], None]) -> str:
            began = time.monotonic()
            signal.alarm(SECONDS)
            try:
                read()
            except LorafError:
                return "refused"
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                failures.setdefault(
                    f"{reader}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}", str(error)[:300]
                )
                return "failed"
            finally:
                signal.alarm(0)
                outcomes["seconds"] = max(outcomes["seconds"], round(time.monotonic() - began))
            return "done"

        chance = random.Random(number)
        for _ in range(cases):
            folder = Path(tempfile.mkdtemp(dir=name))
            try:
                one_case(chance, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    grown = _resident() - before
    if grown > MEMORY:
        failures["memory"] = f"{grown:,} bytes more than before"
    return {"cases": cases, "seed": number, **outcomes, "grown_bytes": grown, "failures": failures}


def _scratch(world: World, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copytree(world.into, folder / "into")
    return folder


def _resident() -> int:
    """The most memory that this process has taken so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    result = campaign(int(sys.argv[1]), *map(int, sys.argv[2:]))
    print(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(bool(result["failures"]))
