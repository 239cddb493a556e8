"""The base model: resolving its name, and checking that it is the one a checkpoint was trained for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraf.base_model import SHORT_NAMES, describe, fingerprint, require_same_base, resolve, sampled_rows
from loraf.errors import BaseMismatch, ConfigError
from tests import standins

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Mistral stand-in in float32, whose weights are exact in bfloat16."""
    folder = standins.make_model("mistral", tmp_path_factory.mktemp("base") / "model")
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def change_weights(folder: Path, change) -> None:
    """Replaces every tensor of `model.safetensors` by change(name, tensor)."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(name, t) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# --- samples of weights -----------------------------------------------------------------------------------------


def test_sampled_rows_are_those_of_the_weights(model):
    tensors = load_file(model / "model.safetensors")
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    samples = sampled_rows(model, [*names, "model.norm.weight", "no.weight"])
    assert sorted(samples) == names
    for name, (rows, sample) in samples.items():
        assert len(rows) == 4 and sample.shape == (4, 64)
        assert torch.equal(sample, tensors[name][rows, :64].bfloat16())


def test_sampled_rows_of_a_damaged_file_are_refused(copy):
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        sampled_rows(copy, ["lm_head.weight"])


# --- names ------------------------------------------------------------------------------------------------------


def test_tiny_is_part_of_the_package():
    folder = resolve("tiny")
    assert (folder / "config.json").is_file()
    assert folder.is_relative_to(ROOT / "loraf")
    assert describe("tiny", folder).architecture == "MistralForCausalLM"


def test_a_local_folder_resolves_to_itself(copy, monkeypatch):
    assert resolve(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert resolve("copy").samefile(copy)
    assert resolve("./copy").samefile(copy)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve("~/copy") == copy


def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"tasks.yaml: model: .* has no config.json"):
        resolve(str(tmp_path), file="tasks.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no model ''"):
        resolve("")


@pytest.mark.parametrize(
    "name", ["nonsense", "./nothing", "/no/such/folder", "a/b/c", "~nobody-here/m/x", "", "x" * 5000, "a\0b"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError) as caught:
        resolve(name, file="tasks.yaml", field="model")
    text = str(caught.value)
    assert "tasks.yaml: model: there is no model" in text
    assert all(known in text for known in ["tiny", *SHORT_NAMES])


ASK = """
import json, sys, time
from loraf.base_model import resolve
from loraf.errors import ConfigError
answers = []
for name in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        answers.append([str(resolve(name)), time.monotonic() - start])
    except ConfigError as error:
        answers.append([f"ConfigError {error}", time.monotonic() - start])
print(json.dumps(answers))
"""


def ask(names: list[str], tmp_path: Path, **environment: str) -> list[tuple[str, float]]:
    """Runs `resolve` in a fresh process with an empty hub cache and this environment. Returns what it reports."""
    cleared = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    run = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(names)],
        cwd=tmp_path,
        env=cleared | {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [tuple(answer) for answer in json.loads(run.stdout.splitlines()[-1])]


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],  # port 9 refuses at once
    ids=["offline", "out of reach"],
)
@pytest.mark.slow
def test_without_a_hub_the_cache_is_used_or_the_reason_is_reported_in_seconds(copy, tmp_path, environment):
    """The cache has the hub's layout: refs name a commit, snapshots hold its files."""
    commit = "0123456789012345678901234567890123456789"
    cached = tmp_path / "hub" / "hub" / "models--mistralai--Mistral-7B-v0.1"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    shutil.copytree(copy, cached / "snapshots" / commit)
    missing = ["llama-3-8b", "org/model-of-nobody", "org/with space"]
    (found, _), *refused = ask(["mistral-7b", *missing], tmp_path, **environment)
    assert Path(found) == cached / "snapshots" / commit
    for name, (answer, seconds) in zip(missing, refused, strict=True):
        assert answer.startswith("ConfigError model: "), answer
        assert f"{SHORT_NAMES.get(name, name)} is not a local folder and could not be downloaded from the hub" in answer
        assert "name a local folder" in answer
        assert seconds < 15, name


# --- fingerprint ------------------------------------------------------------------------------------------------


def test_float32_and_bfloat16_copies_agree(model, copy):
    change_weights(copy, lambda name, tensor: tensor.bfloat16())
    assert load_file(copy / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert fingerprint(copy) == fingerprint(model)
    require_same_base(describe("org/model", model), copy, Path("ckpt"))


def test_shards_and_one_file_agree(model, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert fingerprint(tmp_path) == fingerprint(model)


def test_the_fingerprint_does_not_depend_on_the_folder_name(model, copy):
    assert fingerprint(copy) == fingerprint(model)
    assert len(fingerprint(model)) == 64


def test_a_fine_tuned_copy_differs(model, copy):
    """Changes every weight by a thousandth. bfloat16 resolves 1/256, so some samples change and most do not."""
    generator = torch.Generator().manual_seed(0)
    change_weights(copy, lambda name, t: t * (1 + 1e-3 * torch.randn(t.shape, generator=generator)))
    assert fingerprint(copy) != fingerprint(model)
    with pytest.raises(BaseMismatch, match="has other weights than org/model had") as caught:
        require_same_base(describe("org/model", model), copy, Path("ckpt"))
    assert [problem.field for problem in caught.value.problems] == ["base_model.fingerprint"]
    assert "--allow-other-base" in str(caught.value)


def test_the_fingerprint_covers_every_tensor(model, copy):
    """A change of any single tensor's values, name or shape changes the fingerprint."""
    expected = fingerprint(model)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        changed = {n: (t + 1 if n == name else t) for n, t in tensors.items()}
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        assert fingerprint(copy) != expected, name
    name, tensor = next((n, t) for n, t in tensors.items() if t.ndim == 2)
    for others in (
        {f"{n}.old" if n == name else n: t for n, t in tensors.items()},
        {n: (t.T.contiguous() if n == name else t) for n, t in tensors.items()},
        {n: t for n, t in tensors.items() if n != name},
        tensors | {"model.extra": tensor[:1].clone()},
    ):
        save_file(others, copy / "model.safetensors", {"format": "pt"})
        assert fingerprint(copy) != expected


def test_empty_scalar_and_integer_tensors_have_a_fingerprint(tmp_path):
    odd = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "no.rows": torch.empty(0, 4),
        "no.columns": torch.empty(4, 0),
        "convolution": torch.arange(2 * 3 * 5.0).reshape(2, 3, 5),
        "quantised": torch.arange(20, dtype=torch.int8).reshape(4, 5),
        "flags": torch.tensor([True, False]),
        "float8": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "index": torch.tensor([0, 1, 2], dtype=torch.uint16),
    }
    save_file(odd, tmp_path / "model.safetensors")
    first = fingerprint(tmp_path)
    for name in ("scalar", "convolution", "quantised", "flags"):
        changed = odd | {name: ~odd[name] if odd[name].dtype == torch.bool else odd[name] + 1}
        save_file(changed, tmp_path / "model.safetensors")
        assert fingerprint(tmp_path) != first, name


def test_other_weight_files_in_the_folder_are_not_the_model(model, copy, tmp_path):
    """transformers reads neither the authors' own layout of the weights nor an adapter."""
    save_file({"tok_embeddings.weight": torch.ones(3)}, copy / "consolidated.safetensors")
    save_file({"a": torch.ones(3)}, copy / "adapter_model.safetensors")
    assert fingerprint(copy) == fingerprint(model)


def test_weights_that_cannot_be_read_are_refused(copy):
    (copy / "model.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read"):
        fingerprint(copy)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors weights → convert the weights to safetensors"):
        fingerprint(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match=r"model-00001-of-00002\.safetensors: cannot be read"):
        fingerprint(copy)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        with pytest.raises(ConfigError, match=r"index\.json: is malformed"):
            fingerprint(copy)


def test_the_fingerprint_reads_little(tmp_path):
    """The file has 2 GB, sparse on disk. Only a few rows of it may be read."""
    rows, columns = 262_144, 4096
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}}
    ).encode()
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + rows * columns * 2)
    start = time.process_time()
    fingerprint(tmp_path)
    assert time.process_time() - start < 1


# --- description ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", standins.ARCHITECTURES)
def test_describe_records_the_architecture_and_shapes(architecture, tmp_path):
    folder = standins.make_model(architecture, tmp_path)
    found = describe("mistral-7b", folder, "main")
    assert found.name == "mistralai/Mistral-7B-v0.1"
    assert found.revision == "main"
    assert (
        found.architecture
        == {
            "mistral": "MistralForCausalLM",
            "llama": "LlamaForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
        }[architecture]
    )
    shapes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320}
    shapes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert shapes.items() <= found.shapes.items()
    assert set(found.shapes) - set(shapes) <= {"head_dim"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"architectures": 3}', '{"hidden_size": 3}', '{"text_config": 3}', "\xff"]
)
def test_an_invalid_config_is_refused(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json: is not a transformers config"):
        describe("x", copy)


def test_the_config_of_a_multimodal_model(copy):
    text = {"model_type": "mistral", "hidden_size": 64}
    change_config(copy, architectures=["Mistral3ForConditionalGeneration"], text_config=text)
    found = describe("x", copy)
    assert found.architecture == "Mistral3ForConditionalGeneration"
    assert found.shapes["hidden_size"] == 64


def test_a_config_is_utf8_whatever_the_locale(copy, monkeypatch):
    change_config(copy, note="ä")
    path = copy / "config.json"
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode())
    # pathlib uses this if no encoding is stated. Under LC_ALL=C it returns ASCII.
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    with pytest.raises(UnicodeDecodeError):
        path.read_text()
    assert describe("x", copy).architecture == "MistralForCausalLM"


# --- the same base ----------------------------------------------------------------------------------------------


def test_the_same_model_is_accepted(model, copy):
    require_same_base(describe("org/model", model), copy, Path("ckpt"))


def test_all_differences_are_named(model, copy):
    change_config(copy, architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=3)
    with pytest.raises(BaseMismatch) as caught:
        require_same_base(describe("org/model", model), copy, Path("ckpt"))
    assert [problem.field for problem in caught.value.problems] == [
        "base_model.architecture",
        "base_model.shapes.hidden_size",
        "base_model.shapes.num_hidden_layers",
    ]
    assert all(problem.file == "ckpt" and "org/model" in problem.remedy for problem in caught.value.problems)
    assert "trained for 128, but the model has 64" in str(caught.value)


def test_a_default_that_only_one_config_states_is_accepted(model, copy):
    """Mistral's own config.json has no head_dim, but transformers writes one."""
    assert "head_dim" in describe("x", model).shapes
    change_config(copy, head_dim=...)
    assert "head_dim" not in describe("x", copy).shapes
    require_same_base(describe("org/model", model), copy, Path("ckpt"))
    require_same_base(describe("org/model", copy), model, Path("ckpt"))
    change_config(copy, head_dim=64)
    with pytest.raises(BaseMismatch, match="head_dim"):
        require_same_base(describe("org/model", model), copy, Path("ckpt"))


def test_a_changed_fingerprint_is_refused(model):
    expected = dataclasses.replace(describe("org/model", model), fingerprint="0" * 64)
    with pytest.raises(BaseMismatch, match="other weights"):
        require_same_base(expected, model, Path("ckpt"))
