"""Changed checkpoints and adapters, given to everything that reads them; `hostile_files` is the long campaign."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.source_tree import ROOT


def test_every_reader_succeeds_or_refuses_in_bounded_memory_and_time():
    run = subprocess.run(
        [sys.executable, "-m", "tests.integration.hostile_files", "25"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    result = json.loads(run.stdout)
    assert run.returncode == 0 and result["failures"] == {}, run.stdout
    assert result["refused"] > 10 and result["done"] > 50
