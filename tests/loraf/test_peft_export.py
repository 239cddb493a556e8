"""A PEFT export, loaded by PEFT, gives the same logits as the merged model."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from loraf.delta import Merger, delta_weight
from loraf.peft_export import export_peft
from loraf.tasksets import TaskSet
from tests import standins

SETS = ["base", "math", "code", "math+nlu", "all", "math:0.5+nlu:-1.5", "nlu:4+code:0.25"]
TASKS = ("math", "nlu", "code")


@pytest.fixture(scope="module", params=standins.ARCHITECTURES)
def case(request, tmp_path_factory):
    """The model folder of an architecture, a checkpoint, and prompts as token ids."""
    folder = tmp_path_factory.mktemp(request.param)
    model = standins.make_model(request.param, folder / "model")
    checkpoint = standins.random_checkpoint(folder / "ckpt", model, tasks=TASKS)
    generator = torch.Generator().manual_seed(1)
    return model, checkpoint, torch.randint(3, 320, (3, 24), generator=generator)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_peft_and_the_merged_model_give_the_same_logits(case, tmp_path):
    from peft import PeftModel

    folder, checkpoint, ids = case
    merged = load(folder)
    merger = Merger(merged, checkpoint)
    base = logits(load(folder), ids)
    seen = {}
    for text in SETS:
        task_set = TaskSet.parse(text, TASKS)
        export_peft(checkpoint, task_set, tmp_path / text)
        adapted = PeftModel.from_pretrained(load(folder), tmp_path / text)
        found = logits(adapted, ids)
        merger.merge(task_set)
        expected = logits(merged, ids)
        assert (found - expected).norm() <= 1e-4 * expected.norm(), text
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), text
        assert (text == "base") == torch.allclose(found, base, atol=1e-5)
        seen[text] = found
    # The sets differ much, so agreement is meaningful.
    for one in SETS:
        for other in SETS:
            if one != other:
                assert (seen[one] - seen[other]).norm() > 1e-2 * base.norm(), (one, other)


def test_the_exported_files(case, tmp_path):
    """Every module has PEFT's names and shapes, and B·A is the scaled ΔW."""
    _, checkpoint, _ = case
    task_set = TaskSet.parse("math:0.5+nlu", TASKS)
    before = os.umask(0o027)
    try:
        export_peft(checkpoint, task_set, tmp_path / "deep" / "out")
    finally:
        os.umask(before)
    out = tmp_path / "deep" / "out"
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == checkpoint.manifest.rank
    assert config["base_model_name_or_path"] == checkpoint.manifest.base_model.name
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(checkpoint.manifest.modules)
    for module, spec in checkpoint.manifest.modules.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        assert tuple(a.shape) == (checkpoint.manifest.rank, spec.d_in)
        assert tuple(b.shape) == (spec.d_out, checkpoint.manifest.rank)
        torch.testing.assert_close(b @ a, delta_weight(checkpoint, module, task_set))


def test_another_dtype_rounds_both_matrices(case, tmp_path):
    _, checkpoint, _ = case
    task_set = TaskSet.parse("math", TASKS)
    export_peft(checkpoint, task_set, tmp_path / "half", torch.bfloat16)
    export_peft(checkpoint, task_set, tmp_path / "full")
    half, full = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("half", "full"))
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_exporting_again_replaces_the_files(case, tmp_path):
    _, checkpoint, _ = case
    export_peft(checkpoint, TaskSet.parse("math", TASKS), tmp_path)
    export_peft(checkpoint, TaskSet.parse("nlu", TASKS), tmp_path)
    module = next(iter(checkpoint.manifest.modules))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    product = tensors[f"base_model.model.{module}.lora_B.weight"] @ tensors[f"base_model.model.{module}.lora_A.weight"]
    torch.testing.assert_close(product, delta_weight(checkpoint, module, TaskSet.parse("nlu", TASKS)))
