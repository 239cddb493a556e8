"""The page on PEFT and TRL: its code runs as it stands, and the three ways end in the same checkpoint."""

from __future__ import annotations

import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf_train.cli import main
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/how-to/from-peft-and-trl.md"
WITHIN = 1e-5  # as the page says


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which the page was followed."""
    folder = tmp_path_factory.mktemp("page")
    (settings,) = [block.text for block in blocks("yaml") if block.page == PAGE]
    cells = [block.text for block in blocks("python") if block.page == PAGE]
    assert len(cells) >= 7
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names: dict = {"__name__": "page"}
        exec(compile(cells[0], "<page>", "exec"), names)
        (folder / "tasks.yaml").write_text(settings)
        assert main(["run", "tasks.yaml"]) == 0
        exec(compile("\n".join(cells[1:]), "<page>", "exec"), names)
    return folder


@pytest.mark.parametrize("way", ["from-peft", "from-trl"])
def test_peft_trl_and_yaml_end_in_the_same_checkpoint(ran, way):
    yaml, other = Checkpoint.open(ran / "from-yaml"), Checkpoint.open(ran / way)
    assert other.manifest.modules == yaml.manifest.modules
    assert other.manifest.projection == yaml.manifest.projection
    assert other.manifest.base_model == yaml.manifest.base_model
    task, same = yaml.manifest.task("sums"), other.manifest.task("sums")
    assert (same.alpha, same.sparsity, same.k, same.dtype) == (task.alpha, task.sparsity, task.k, task.dtype)
    for module, b in yaml.tasks["sums"].items():
        assert torch.equal(other.tasks["sums"][module].positions, b.positions)
        torch.testing.assert_close(other.tasks["sums"][module].values, b.values, rtol=0, atol=WITHIN)
        assert b.values.abs().max() > 1000 * WITHIN


def test_a_run_goes_on_where_peft_stopped(ran, monkeypatch):
    monkeypatch.chdir(ran)
    before = (ran / "from-peft/tasks/sums.safetensors").read_bytes()
    settings = (ran / "tasks.yaml").read_text().replace("./from-yaml", "./from-peft")
    second = "{name: differences, alpha: 16, data: {train: differences.jsonl}}"
    (ran / "on.yaml").write_text(settings.replace("{train: sums.jsonl}}]", f"{{train: sums.jsonl}}}}, {second}]"))
    assert main(["run", "on.yaml"]) == 0
    assert (ran / "from-peft/tasks/sums.safetensors").read_bytes() == before
    run, trl = Checkpoint.open("from-peft"), Checkpoint.open("from-trl")
    assert run.manifest.task("differences").trained_with == ("sums",)
    for module, b in run.tasks["differences"].items():
        torch.testing.assert_close(trl.tasks["differences"][module].values, b.values, rtol=0, atol=WITHIN)


def test_the_next_task_equals_that_of_a_run_under_retention(ran, monkeypatch):
    monkeypatch.chdir(ran)
    settings = (ran / "tasks.yaml").read_text()
    second = "{name: differences, alpha: 16, data: {train: differences.jsonl}}"
    (ran / "two.yaml").write_text(settings.replace("{train: sums.jsonl}}]", f"{{train: sums.jsonl}}}}, {second}]"))
    assert main(["run", "two.yaml"]) == 0
    yaml, trl = Checkpoint.open("from-yaml"), Checkpoint.open("from-trl")
    assert yaml.manifest.task_names == trl.manifest.task_names == ("sums", "differences")
    assert trl.manifest.task("differences").trained_with == ("sums",)
    for module, b in yaml.tasks["differences"].items():
        assert torch.equal(trl.tasks["differences"][module].positions, b.positions)
        torch.testing.assert_close(trl.tasks["differences"][module].values, b.values, rtol=0, atol=WITHIN)
