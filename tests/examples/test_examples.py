"""The demo's configuration loads. For the paper's see test_mistral_7b.py."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from loraf_train.settings.loading import load

ROOT = Path(__file__).parents[2]


def test_the_demos_configuration_loads_and_its_tasks_fit(tmp_path):
    demo = ROOT / "examples" / "demo"
    spec = importlib.util.spec_from_file_location("make_data", demo / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.main(["--out", str(tmp_path / "data")])
    shutil.copy(demo / "tasks.yaml", tmp_path)
    config = load(tmp_path / "tasks.yaml")
    assert [task.name for task in config.tasks] == list(make_data.TASKS)
    assert sum(1 - task.sparsity for task in config.tasks) <= 1
