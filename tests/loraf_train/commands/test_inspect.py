"""`loraf-train inspect`: quick and complete, and with --verify it names everything that is damaged."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.manifest import BaseModel, Manifest, Module, Projection, StoredFile, Task
from tests.loraf_train.command_line import run, words


def big_manifest() -> Manifest:
    """Ten tasks for Mistral-7B's shapes: 224 modules."""
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    names = {f"self_attn.{n}_proj": s for n, s in shapes.items()}
    names |= {f"mlp.{n}_proj": s for n, s in (("gate", (14336, 4096)), ("up", (14336, 4096)), ("down", (4096, 14336)))}
    modules = {f"model.layers.{i}.{n}": Module(*s, "0" * 64) for i in range(32) for n, s in names.items()}
    k = {name: manifests.positions_per_matrix(0.95, module.d_out, 64) for name, module in modules.items()}
    tasks = tuple(
        Task(
            name=f"task{i}",
            alpha=64.0,
            sparsity=0.95,
            dtype="bfloat16",
            file=StoredFile(f"tasks/task{i}.safetensors", 22_000_000, "0" * 64),
            k=k,
            trained_with=tuple(f"task{j}" for j in range(i)),
            scores=({"set": "task0", "evaluation": "e", "metric": "exact_match", "score": 0.5, "count": 10},),
        )
        for i in range(10)
    )
    base = BaseModel("mistralai/Mistral-7B-v0.1", "MistralForCausalLM", "0" * 64)
    return Manifest(base, 64, Projection("philox", 0, "0" * 64), modules, tasks)


def test_inspect_of_a_7b_manifest_is_quick_and_needs_no_torch(tmp_path):
    (tmp_path / manifests.FILE_NAME).write_text(big_manifest().to_json())
    code = """
import sys
from loraf_train.cli import main
status = main(["inspect", sys.argv[1]])
assert not {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)
sys.exit(status)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 3
    rows = {w[0]: w for w in map(words, done.stdout.splitlines()) if w}
    assert rows["down_proj"][1:] == ["4096×14336", "32", *["0.9500"] * 10, "50.0%"]
    assert rows["10"][1:3] == ["task9", "+".join(f"task{i}" for i in range(10))]
    assert "10 more tasks like task9 fit" in done.stdout


def test_inspect_shows_tasks_scores_and_digests(trained, capsys):
    folder = trained[0] / "ckpt"
    manifest = manifests.read(folder)
    status, out, _ = run(capsys, "inspect", str(folder), "--verify", "--layers")
    assert status == 0
    assert manifest.adapter_digest in out and manifest.projection.sha256 in out
    assert all(task.file.sha256 in out for task in manifest.tasks)
    assert all(name in out for name in manifest.modules)
    assert "upper+truth" in out and "verified: every file" in out
    status, out, _ = run(capsys, "inspect", str(folder), "--json")
    facts = json.loads(out)
    assert status == 0 and facts["verified"] is False
    assert [(t["name"], t["as_trained"]) for t in facts["tasks"]] == [("upper", "upper"), ("truth", "upper+truth")]
    assert facts["capacity"]["positions"] == sum(m.d_out * 8 for m in manifest.modules.values())
    assert facts["capacity"]["free"] == facts["capacity"]["positions"] - sum(t["k"] for t in facts["tasks"])
    (bytes_of,) = {t["bytes"] for t in facts["tasks"]}
    assert bytes_of == (folder / "tasks/upper.safetensors").stat().st_size
    name, module = next(iter(facts["modules"].items()))
    held = load_file(folder / "tasks/upper.safetensors")[f"{name}.values"].size
    assert module["sparsity"]["upper"] == pytest.approx(1 - held / (module["shape"][0] * 8))


def test_verify_names_everything_that_is_damaged(copied, capsys):
    for name, place in (("upper", 0.5), ("truth", 0.9)):
        file = copied / f"ckpt/tasks/{name}.safetensors"
        data = bytearray(file.read_bytes())
        data[int(len(data) * place)] ^= 1
        file.write_bytes(data)
    status, out, _ = run(capsys, "inspect", "ckpt")  # the manifest is intact
    assert status == 0 and "not verified" in out
    status, out, err = run(capsys, "inspect", "ckpt", "--verify")
    assert (status, out) == (2, "")
    assert "upper.safetensors" in err and "truth.safetensors" in err and "SHA-256" in err
    (copied / "ckpt/tasks/upper.safetensors").unlink()
    manifest = manifests.read(copied / "ckpt")
    other_seed = replace(manifest, projection=replace(manifest.projection, seed=5))
    (copied / "ckpt/loraf.json").write_text(other_seed.to_json())
    status, _, err = run(capsys, "inspect", "ckpt", "--verify")
    assert status == 2
    assert "cannot be read" in err and "truth.safetensors" in err
    assert "is not the A that the tasks were trained with" in err and "more modules" in err
    text = (copied / "ckpt/loraf.json").read_text()
    (copied / "ckpt/loraf.json").write_text(text.replace('"alpha": 8', '"alpha": 9'))
    status, _, err = run(capsys, "inspect", "ckpt")
    assert status == 2 and "digest" in err


def test_statistics_and_named_sets_are_shown_and_verified(copied, capsys):
    facts = json.loads(run(capsys, "inspect", "ckpt", "--json")[1])
    assert [task["statistics"] for task in facts["tasks"]] == [None, None] and facts["sets"] == {}
    checkpoint = Checkpoint.open(copied / "ckpt")
    checkpoint.set_statistics("truth", bytes(1234))
    checkpoint.set_named_set("both", {"upper": 0.5, "truth": 1.0})
    sha256 = hashlib.sha256(bytes(1234)).hexdigest()
    status, out, err = run(capsys, "inspect", "ckpt", "--verify")
    assert status == 0, err
    rows = {w[1]: w for w in map(words, out.splitlines()) if w[:1] in (["1"], ["2"])}
    assert rows["truth"][-3:-1] == ["1.234", "kB"] and rows["upper"][-2] == "–"
    assert ["both", "upper:0.5+truth"] in map(words, out.splitlines())
    assert f"statistics/truth.safetensors  {sha256}" in out
    facts = json.loads(run(capsys, "inspect", "ckpt", "--json")[1])
    assert facts["tasks"][1]["statistics"] == {"bytes": 1234, "sha256": sha256}
    assert facts["sets"] == {"both": {"upper": 0.5, "truth": 1.0}}
    (copied / "ckpt/statistics/truth.safetensors").write_bytes(bytes(1233) + b"x")
    assert run(capsys, "inspect", "ckpt")[0] == 0
    status, _, err = run(capsys, "inspect", "ckpt", "--verify")
    assert status == 2 and "statistics/truth.safetensors" in err and "SHA-256" in err


def test_inspect_refuses_a_folder_without_a_checkpoint(tmp_path, capsys):
    status, _, err = run(capsys, "inspect", str(tmp_path))
    assert status == 2 and "no loraf.json" in err
