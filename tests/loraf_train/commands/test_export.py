"""An export has the logits that the formula gives, in PEFT and in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraf import manifest as manifests
from loraf.matrices.projection import projection
from tests.loraf_train.command_line import run, words
from tests.standins import make_model, random_checkpoint


@pytest.fixture(scope="module")
def random_one(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint of three random tasks, its base model)."""
    folder = tmp_path_factory.mktemp("random")
    model = make_model("qwen2", folder / "base")
    random_checkpoint(folder / "ckpt", model)
    return folder / "ckpt", model


def by_hand(checkpoint: Path, model: Path, weights: dict[str, float]) -> torch.nn.Module:
    """The base model with Σ w·α/r·B·A added, computed from the checkpoint's files."""
    manifest = manifests.read(checkpoint)
    summed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in manifest.modules.items():
        weight = summed.get_submodule(name).weight
        a = projection(manifest.projection.seed, name, manifest.rank, module.d_in).astype(np.float64)
        delta = np.zeros((module.d_out, module.d_in))
        for task, factor in weights.items():
            file = checkpoint / f"tasks/{task}.safetensors"
            tensors = _as_float32(file)
            b = np.zeros((module.d_out, manifest.rank))
            parts = (tensors[f"{name}.{part}"] for part in ("rows", "cols", "values"))
            for row, column, value in zip(*parts, strict=True):
                b[int(row), int(column)] = value
            delta += factor * manifest.task(task).alpha / manifest.rank * (b @ a)
        with torch.no_grad():
            weight += torch.from_numpy(delta).float()
    return summed


def _as_float32(file: Path) -> dict[str, list[float]]:
    return {name: tensor.float().tolist() for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[1, 40, 50, 60, 70, 80, 41, 42]])
    return model(input_ids=ids).logits


SETS = [
    (["--tasks", "all"], {"math": 1, "nlu": 1, "code": 1}),
    (["--tasks", "code:0.5,math"], {"math": 1, "code": 0.5}),
    (["--as-trained", "nlu"], {"math": 1, "nlu": 1}),
]


@pytest.mark.parametrize(("options", "weights"), SETS)
def test_an_export_has_the_logits_of_the_formula(random_one, tmp_path, capsys, options, weights):
    checkpoint, model = random_one
    expected = logits(by_hand(checkpoint, model, weights))
    base = logits(AutoModelForCausalLM.from_pretrained(model))
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    for form in ("peft", "merged"):
        out = tmp_path / form
        out.mkdir()  # an empty folder is allowed
        status, printed, _ = run(capsys, "export", str(checkpoint), *options, "--format", form, "--out", str(out))
        assert status == 0
        assert "+".join(w for w in words(printed) if "+" in w).startswith("math")
        if form == "peft":
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(out)
            assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [
                *AutoTokenizer.from_pretrained(model)("ab")["input_ids"]
            ]
        difference = (logits(loaded) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4, form
        assert not list(out.parent.glob(".*partial"))


def test_a_merged_export_in_bfloat16_is_the_sum_rounded_once(random_one, tmp_path, capsys):
    checkpoint, model = random_one
    out = tmp_path / "out"
    arguments = ["--tasks", "math", "--format", "merged", "--dtype", "bfloat16", "--out", str(out)]
    assert run(capsys, "export", str(checkpoint), *arguments)[0] == 0
    written = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    expected = by_hand(checkpoint, model, {"math": 1.0}).state_dict()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        # The reference sums in float64, and may round a value between two bf16 numbers the other way.
        same = (tensor == expected[name].bfloat16()).float().mean()
        assert same > 0.999, name


def test_export_refuses_to_overwrite_anything(random_one, tmp_path, capsys):
    checkpoint, model = random_one
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    for name, message in (("full", "is not empty"), ("file", "is not a folder"), ("file/below", "cannot be written")):
        arguments = ["--tasks", "all", "--format", "peft", "--out", str(tmp_path / name)]
        status, _, err = run(capsys, "export", str(checkpoint), *arguments)
        assert status == 2
        assert message in err and "--out" in err
    assert (tmp_path / "full/precious.txt").read_text() == "mine"
    status, _, err = run(
        capsys, "export", str(checkpoint), "--tasks", "art", "--format", "peft", "--out", str(tmp_path / "new")
    )
    assert status == 2 and "no task 'art'" in err
    assert not (tmp_path / "new").exists()


def test_export_refuses_another_base_without_the_option(random_one, tmp_path, capsys):
    checkpoint, _ = random_one
    other = make_model("qwen2", tmp_path / "other", seed=3)
    arguments = ["export", str(checkpoint), "--tasks", "all", "--format", "merged", "--model", str(other), "--out"]
    status, _, err = run(capsys, *arguments, str(tmp_path / "out"))
    assert status == 2 and "other weights" in err and "--allow-other-base" in err
    assert run(capsys, *arguments, str(tmp_path / "out"), "--allow-other-base")[0] == 0
    expected = logits(by_hand(checkpoint, other, {"math": 1, "nlu": 1, "code": 1}))
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (exported - expected).abs().max() / expected.abs().max() < 1e-4
    unlike = make_model("llama", tmp_path / "unlike")
    arguments[arguments.index(str(other))] = str(unlike)
    status, _, err = run(capsys, *arguments, str(tmp_path / "out2"))
    assert status == 2 and "LlamaForCausalLM" in err
