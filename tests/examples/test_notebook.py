"""The notebook runs from top to bottom with a tenth of its steps, and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook" / "two-tasks.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert str(ROOT) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_trains_two_tasks_and_mixes_them(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "30")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert printed.count("score of each task under each task set") == 2
    assert "after pig-latin" in printed and "after count" in printed
    lines = "".join(output.get("text", "") for output in notebook.cells[-2].outputs).splitlines()
    mixed = [line for line in lines if line.count("%") == 2]
    weights = ["pig-latin", *(f"pig-latin+count:{weight}" for weight in ("0.25", "0.5", "0.75")), "pig-latin+count"]
    assert [line.split()[0] for line in mixed] == weights
    manifest = json.loads((tmp_path / "two-tasks" / "ckpt" / "loraf.json").read_text())
    assert [task["name"] for task in manifest["tasks"]] == ["pig-latin", "count"]
