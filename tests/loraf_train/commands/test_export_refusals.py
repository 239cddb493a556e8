"""What cannot be exported is refused before any weight is loaded, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.peft_import import read_peft
from loraf_train.commands import export_peft
from tests.loraf_train import exported
from tests.loraf_train.command_line import run
from tests.standins import make_model, random_checkpoint


@pytest.fixture(scope="module")
def random_one(tmp_path_factory):
    """(checkpoint of three random tasks, its base model)."""
    folder = tmp_path_factory.mktemp("random")
    model = make_model("llama", folder / "base")
    random_checkpoint(folder / "ckpt", model)
    return folder / "ckpt", model


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def sharded(folder):
    exported.load(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def without_a_shard(folder):
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


class Trap:
    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was opened')",))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def without_a_tensor(folder):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS = {
    "quantized": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config",
    ),
    "unknown quantization": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "made-up"}),
        "quantization_config",
    ),
    "flash attention": (
        lambda folder: set_config(folder, attn_implementation="flash_attention_2"),
        "FlashAttention2",
    ),
    "missing shard": (without_a_shard, "model-00002-of"),
    "truncated": (truncated, "model.safetensors"),
    "pickled": (pickled, "safetensors"),
    "missing tensor": (without_a_tensor, "model.norm.weight"),
    "other shape": (lambda folder: set_config(folder, intermediate_size=64), "mlp.up_proj"),
    "fewer layers": (lambda folder: set_config(folder, num_hidden_layers=1), "layers"),
    "own code": (
        lambda folder: set_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "auto_map",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_base_that_cannot_be_merged_is_refused(random_one, tmp_path, capsys, name):
    checkpoint, model = random_one
    damage, named = FAULTS[name]
    other = tmp_path / "other"
    shutil.copytree(model, other)
    damage(other)
    arguments = ["--tasks", "all", "--format", "merged", "--model", str(other), "--allow-other-base"]
    status, _, err = run(capsys, "export", str(checkpoint), *arguments, "--out", str(tmp_path / "out"))
    assert status == 2 and "Traceback" not in err
    assert named in err and "→" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_generation_config_is_exported_as_it_is(random_one, tmp_path, capsys):
    """transformers reads this one, and refuses to write it."""
    checkpoint, model = random_one
    other = tmp_path / "other"
    shutil.copytree(model, other)
    text = '{"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.9, "top_p": 0.6}'
    (other / "generation_config.json").write_text(text)
    arguments = ["--tasks", "all", "--format", "merged", "--model", str(other), "--out", str(tmp_path / "out")]
    assert run(capsys, "export", str(checkpoint), *arguments)[0] == 0
    assert (tmp_path / "out/generation_config.json").read_text() == text
    assert exported.load(tmp_path / "out").generation_config.eos_token_id == [2, 7]


def test_numbers_that_transformers_keeps_in_float32_are_exported_in_it(tmp_path, capsys):
    base = exported.build("deepseek_v3", tmp_path / "base")
    model = exported.load(base, torch.bfloat16)
    for _, buffer in model.named_buffers():
        if buffer.dtype == torch.float32 and buffer.shape == (4,):
            buffer.copy_(torch.tensor([0.1, -0.3, 1.0001, 7.123]))
    model.save_pretrained(base)
    shapes = {"model.layers.0.self_attn.o_proj": (64, 64)}
    Checkpoint.create(tmp_path / "ckpt", describe(str(base), base), 4, shapes, 0)
    for dtype in ([], ["--dtype", "bfloat16"]):
        out = tmp_path / f"out{len(dtype)}"
        arguments = ["--tasks", "base", "--format", "merged", "--out", str(out), *dtype]
        assert run(capsys, "export", str(tmp_path / "ckpt"), *arguments)[0] == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
        kept = [t for t in after.values() if t.dtype == torch.float32]
        assert kept and not any(torch.equal(t, t.bfloat16().float()) for t in kept)


def test_peft_applies_an_export_of_a_model_with_experts(tmp_path, capsys):
    """The quick form of benchmarks/exports.py, together with the models with experts of test_agreement.py."""
    found = exported.compare(exported.build("glm4_moe", tmp_path / "base"), tmp_path)
    assert found["effect"] > 0.1 and len(found["errors"]) == 3
    assert max(found["errors"].values()) <= 1e-4, found
    modules = Checkpoint.open(tmp_path / "ckpt").manifest.modules
    assert read_peft(tmp_path / "peft").modules.keys() == modules.keys(), "what was exported can be imported"


def test_names_that_peft_loses_are_refused(tmp_path, capsys):
    """PEFT renames `shared_experts` of this model once more, and then finds no such layer."""
    found = exported.compare(exported.build("laguna", tmp_path / "base"), tmp_path)
    assert list(found["errors"]) == ["merged"] and found["errors"]["merged"] <= 1e-4
    assert "shared_experts" in found["refusals"]["peft"]


def test_an_export_that_peft_would_not_apply_is_refused(tmp_path, capsys, monkeypatch):
    base = exported.build("glm4_moe", tmp_path / "base")
    shapes, _ = exported.trainable(exported.load(base))
    Checkpoint.create(tmp_path / "ckpt", describe(str(base), base), 4, shapes, 0)
    monkeypatch.setattr(export_peft, "peft_targets", lambda _, modules: (list(modules), []))
    arguments = ["--tasks", "all", "--format", "peft", "--out", str(tmp_path / "out")]
    status, _, err = run(capsys, "export", str(tmp_path / "ckpt"), *arguments)
    assert status == 2 and "mlp" in err and "--format merged" in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_peft_export_without_the_base_says_that_it_was_not_checked(random_one, tmp_path, capsys):
    checkpoint, model = random_one
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    moved = model.with_name("moved")
    model.rename(moved)
    try:
        arguments = ["--tasks", "all", "--format", "peft", "--out", str(tmp_path / "out")]
        status, printed, _ = run(capsys, "export", str(tmp_path / "ckpt"), *arguments)
    finally:
        moved.rename(model)
    assert status == 0 and (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "not checked" not in printed, "the architecture and the shapes in the manifest are enough here"
