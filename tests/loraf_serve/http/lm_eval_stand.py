"""lm-evaluation-harness in its own interpreter, offline, on the tasks of a folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import blocks
from tests.source_tree import ROOT
from tests.tools import needs

PYTHON = ROOT / ".tools" / "lm-eval" / "bin" / "python"
RUNS = Path(__file__).with_name("lm_eval_runs.py")

requires_lm_eval = pytest.mark.skipif(not PYTHON.exists(), reason=needs("lm-eval"))


def write_tasks(folder: Path) -> None:
    """Writes the tasks that docs/how-to/evaluate-with-lm-eval.md shows, `shout` and `choose`, into `folder/lm-eval`."""
    for block in blocks("yaml"):
        if block.page.name == "evaluate-with-lm-eval.md":
            file = folder / block.text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text, encoding="utf-8")


def write_json_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def run_lm_eval(folder: Path, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what each run of `lm_eval.simple_evaluate` gave, or `{"error": …}`.

    Args:
        folder: paths are relative to it; tasks are described in `folder/lm-eval/*.yaml`.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(RUNS), str(folder)]
    run = subprocess.run(
        command,
        input=json.dumps([{"log_samples": True, **run} for run in runs]),
        cwd=folder,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))
