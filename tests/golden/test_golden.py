"""Files that an earlier version wrote are read, verified, served and resumed today. `origin.json` says which version.

The tests reach the project by its commands, `loraf.checkpoint`, `loraf.delta`, `loraf.checkpoint_stream` and `launch`.
If one fails, the format or the arithmetic has changed. Never make the golden files anew to let it pass.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loraf
from loraf.checkpoint import Checkpoint
from loraf.checkpoint_stream import CheckpointStream
from loraf.delta import delta_weight, task_scale
from loraf.tasksets import TaskSet
from loraf_serve.launch import launch
from loraf_train.cli import main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKPOINT = HERE / "checkpoint" / "ckpt"
ORIGIN = json.loads((HERE / "origin.json").read_text())
ANSWERS = json.loads((HERE / "answers.json").read_text())
LOGITS = load_file(HERE / "logits.safetensors")
SETS = ANSWERS["sets"]
PEFT_SET = ANSWERS["peft_set"]
TINY = Path(str(resources.files("loraf").joinpath("data/tiny")))


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture
def copied(tmp_path):
    """A copy of the checkpoint, alone."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "copied"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@torch.no_grad()
def require_golden_logits(model: torch.nn.Module, name: str) -> None:
    for prompt in ANSWERS["prompts"]:
        found = model(input_ids=LOGITS[f"input_ids.{prompt}"][None]).logits[0]
        torch.testing.assert_close(found, LOGITS[f"logits.{name}.{prompt}"], rtol=0, atol=1e-4, msg=f"{name}, {prompt}")


@torch.no_grad()
def with_deltas(model: torch.nn.Module, deltas: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A copy of the model with ΔW added to its weights."""
    changed = copy.deepcopy(model)
    for module, delta in deltas.items():
        changed.get_submodule(module).weight += delta
    return changed


def deltas_of(checkpoint: Checkpoint, task_set: TaskSet) -> dict[str, torch.Tensor]:
    return {module: delta_weight(checkpoint, module, task_set) for module in checkpoint.manifest.modules}


# --- read and verified -----------------------------------------------------------------------------------------------


def test_the_checkpoint_is_verified_and_has_its_digest(capsys):
    assert main(["inspect", str(CHECKPOINT), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] and facts["adapter_digest"] == ANSWERS["adapter_digest"]
    assert [task["name"] for task in facts["tasks"]] == ["first", "second", "third"]


def test_run_over_a_finished_checkpoint_only_scores_it_again(tmp_path, capsys):
    """Its scores do not say what they were measured on, so they are measured once more, and are the same."""
    shutil.copytree(HERE / "checkpoint", tmp_path, dirs_exist_ok=True)
    before = scores(CHECKPOINT)
    assert main(["run", str(tmp_path / "tasks.yaml")]) == 0
    out = capsys.readouterr().out
    assert "to train: nothing" in out and "trained already: first, second, third" in out
    assert "first: its stored scores" in out and "training step" not in out
    folder = tmp_path / CHECKPOINT.relative_to(HERE / "checkpoint")
    assert scores(folder) == pytest.approx(before, rel=1e-5)
    first, second = digests(tmp_path), digests(HERE / "checkpoint")
    assert {name for name in first if first[name] != second[name]} == {
        str((folder / "loraf.json").relative_to(tmp_path))
    }

    assert main(["run", str(tmp_path / "tasks.yaml")]) == 0
    assert "scoring" not in capsys.readouterr().out
    assert digests(tmp_path) == first


def scores(folder: Path) -> dict[str, float]:
    tasks = json.loads((folder / "loraf.json").read_text())["tasks"]
    names = ("set", "evaluation", "metric", "count")
    return {f"{task['name']}: {[s[name] for name in names]}": s["score"] for task in tasks for s in task["scores"]}


# --- served ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_each_set_gives_the_golden_logits(tiny, name):
    checkpoint = Checkpoint.open(CHECKPOINT)
    task_set = TaskSet.of(SETS[name], checkpoint.manifest.task_names)
    require_golden_logits(with_deltas(tiny, deltas_of(checkpoint, task_set)), name)


def test_read_as_a_stream_it_gives_the_golden_logits(tiny):
    """As the backend `resident` reads a checkpoint: some modules at a time, in several goes."""
    found = {name: {} for name in SETS}
    with CheckpointStream.open(CHECKPOINT) as stream:
        manifest = stream.manifest
        projections = stream.projections()
        modules = list(manifest.modules)
        for some in (modules[:5], modules[5:-1]):  # the last is left to `finish`
            with stream.read_modules(some) as tasks:
                for module in some:
                    scaled = {t.name: tasks[t.name][module].dense() for t in manifest.tasks}
                    scaled = {t: b * task_scale(manifest.task(t).alpha, manifest.rank) for t, b in scaled.items()}
                    for name, weights in SETS.items():
                        b = sum((w * scaled[t] for t, w in weights.items()), torch.zeros_like(scaled["first"]))
                        found[name][module] = b @ projections[module]
        stream.finish()
    checkpoint = Checkpoint.open(CHECKPOINT)
    for name, weights in SETS.items():
        task_set = TaskSet.of(weights, manifest.task_names)
        found[name][modules[-1]] = delta_weight(checkpoint, modules[-1], task_set)
        require_golden_logits(with_deltas(tiny, found[name]), name)


@pytest.mark.slow
def test_a_server_gives_the_golden_tokens(monkeypatch):
    monkeypatch.chdir(ROOT)
    with launch("tiny", f"golden={CHECKPOINT}", options=("--backend", "merged", "--dtype", "float32")) as server:
        (adapter,) = server.client.adapters()
        assert adapter.name == "golden"
        asked = {name: {"tasks": weights} if weights else {"base": True} for name, weights in SETS.items()}
        asked["as-trained-second"] = {"as_trained": "second"}
        for name, selection in asked.items():
            for prompt, text in ANSWERS["prompts"].items():
                expected = ANSWERS["greedy"][name][prompt]
                wanted = {**selection, "temperature": 0.0, "max_tokens": len(expected), "ignore_eos": True}
                answer = server.client.generate(text, **wanted)
                assert list(answer.token_ids) == expected, (name, prompt)


# --- gone on with ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_golden_bytes(tmp_path):
    """The manifests may differ in versions alone, and so in the digest of the whole.

    The state is from before dropout was drawn by token, and is finished by the rule of its time. A state of another
    release of LoRAF is not used, by design; then the task starts anew, with the dropout of today.
    """
    now = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    before = {name: ORIGIN["versions"][name] for name in now}
    if now != before:
        pytest.skip(f"trained bits belong to the versions that they were made with, {before}; here are {now}")
    shutil.copytree(HERE / "interrupted", tmp_path, dirs_exist_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "loraf_train.cli", "run", str(tmp_path / "tasks.yaml"), "--set", "retention=off"],
        cwd=ROOT,
        env={**os.environ, **ORIGIN["environment"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    place = ORIGIN["interrupted"]
    if loraf.__version__ == ORIGIN["versions"]["loraf"]:
        assert f"second: resumes after training step {place['step']} of {place['steps']}\n" in ran.stdout, ran.stdout
        assert "second: calibration step" not in ran.stdout  # not anew
        assert "last bits may differ" not in ran.stdout
    found, expected = (digests(folder) for folder in (tmp_path / "ckpt", HERE / "interrupted-finished"))
    assert found.keys() == expected.keys()
    if loraf.__version__ != ORIGIN["versions"]["loraf"]:
        assert "state of the interrupted training cannot be used: versions.loraf was" in ran.stdout, ran.stdout
        return
    for name in found.keys() - {"loraf.json"}:
        assert found[name] == expected[name], name
    assert without_versions(tmp_path / "ckpt") == without_versions(HERE / "interrupted-finished")


def without_versions(folder: Path) -> dict:
    manifest = json.loads((folder / "loraf.json").read_text())
    del manifest["digest"]
    for task in manifest["tasks"]:
        del task["training"]["versions"]
        task["training"].pop("examples_sha256", None)  # likewise what follows: not stored at that time
        for score in task["scores"]:
            score.pop("digest", None)
    return manifest


# --- as a PEFT LoRA --------------------------------------------------------------------------------------------------


def test_todays_peft_export_has_the_golden_tensors(tmp_path):
    tasks = ",".join(f"{name}:{weight}" for name, weight in SETS[PEFT_SET].items())
    assert main(["export", str(CHECKPOINT), "--tasks", tasks, "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "peft", HERE / "peft"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    configs = [folder / "adapter_config.json" for folder in (tmp_path / "peft", HERE / "peft")]
    assert json.loads(configs[0].read_text()) == json.loads(configs[1].read_text())


def test_peft_loads_the_golden_export(tiny):
    from peft import PeftModel

    require_golden_logits(PeftModel.from_pretrained(copy.deepcopy(tiny), HERE / "peft").eval(), PEFT_SET)


def test_the_golden_export_is_not_imported_over_its_own_tasks(copied, capsys):
    assert main(["import", str(HERE / "peft"), "--into", str(copied), "--name", "both"]) == 2
    told = capsys.readouterr().err
    assert "task 'first' owns" in told and "task 'second' owns" in told
    assert digests(copied) == digests(CHECKPOINT)


def test_the_golden_export_is_imported_exactly(tiny, copied):
    """Onto the positions that it came from, once they are free again."""
    for task in ("second", "first"):
        assert main(["remove", str(copied), task]) == 0
    assert main(["import", str(HERE / "peft"), "--into", str(copied), "--name", "both"]) == 0
    assert digests(copied)["tasks/both.safetensors"] == ANSWERS["imported_sha256"]
    checkpoint = Checkpoint.open(copied)
    assert checkpoint.manifest.task_names == ("third", "both")
    task_set = TaskSet.parse("both", checkpoint.manifest.task_names)
    require_golden_logits(with_deltas(tiny, deltas_of(checkpoint, task_set)), PEFT_SET)
