"""A base model's files are checked before anything reads a tensor: missing, damaged, quantised, or not its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraf import base_files
from loraf.base_model import describe, fingerprint, resolve
from loraf.errors import ConfigError
from tests import standins

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return standins.make_model("llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def in_shards(folder: Path, changed: dict[str, str | None] | None = None) -> None:
    """Splits the weights into two files with an index. `changed`: weight → another file in the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed | (changed or {})}))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only(folder: Path) -> str:
    (problem,) = base_files.problems(folder)
    return str(problem)


def test_a_whole_model_has_no_problem_in_one_file_or_in_several(folder):
    change_config(folder, quantization_config=None, auto_map={"AutoConfig": "own.Config"})
    assert base_files.problems(folder) == []
    whole = {name: (t.shape, t.dtype) for name, t in base_files.without_values(folder).items()}
    in_shards(folder)
    base_files.require_loadable(folder)
    assert {name: (t.shape, t.dtype) for name, t in base_files.without_values(folder).items()} == whole


def test_an_adapter_beside_a_model_is_refused_wherever_a_model_is_named_or_described(folder):
    (folder / "adapter_config.json").write_text("{}")
    for use in (
        lambda: resolve(str(folder)),
        lambda: describe("name", folder),
        lambda: base_files.require_loadable(folder),
    ):
        with pytest.raises(ConfigError, match=r"adapter_config.json: is an adapter in the base.*→ move it"):
            use()


def test_a_generation_config_that_transformers_cannot_take_is_named(folder):
    file = folder / "generation_config.json"
    for taken in ("{}", "{not json"):  # the latter, transformers skips
        file.write_text(taken)
        assert base_files.problems(folder) == []
    for refused in ("[]", "null", "3"):
        file.write_text(refused)
        assert f"{file}: is not a JSON object" in only(folder)


def test_pickled_weights_alone_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors but pytorch_model.bin, and pickled weights are never loaded" in only(folder)


def test_weights_that_transformers_would_not_find_are_missing(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "has no model.safetensors → complete the download" in only(folder)


def test_missing_and_damaged_shards_are_all_named(folder):
    in_shards(folder)
    first, second = sorted(folder.glob("*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    first.unlink()
    missing, damaged = map(str, base_files.problems(folder))
    assert missing.startswith(f"{folder / INDEX}: 1 of the 2 files that it names are not there: {first.name}")
    assert damaged.startswith(f"{second}: cannot be read")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "a/../../b.safetensors", "model.bin", 3]
)
def test_an_index_names_safetensors_files_in_the_folder_only(folder, name):
    in_shards(folder, {"lm_head.weight": name})
    assert "is malformed" in only(folder) and INDEX in only(folder)
    with pytest.raises(ConfigError, match="is malformed"):
        fingerprint(folder)


def test_a_weight_that_no_file_holds_is_named(folder):
    in_shards(folder, {"model.norm.bias": "model-00001-of-00002.safetensors"})
    assert "names model.norm.bias, but the weights are not in the files" in only(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "not known"}},
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_a_config_that_speaks_of_quantised_weights_is_refused(folder, config):
    change_config(folder, **config)
    part, key = next(iter(config.items()))
    field = part if part.endswith("_config") and part != "text_config" else f"text_config.{next(iter(key))}"
    assert f"config.json: {field}: the weights are quantised" in only(folder)


# --- after loading ----------------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """Two layers, each with a linear layer that has no bias, as transformers names them."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4, bias=False)}) for _ in "ab")


def report(**keys) -> dict:
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()} | keys


def stored(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_file({f"layers.{i}.up.weight": torch.ones(4, 4).to(dtype) for i in (0, 1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name", ["layers.2.up.weight", "layers.0.up.bias", "layers.0.norm.weight"], ids=["layer", "bias", "module"]
)
def test_weights_that_the_config_leaves_out_are_refused(tmp_path, name):
    (problem,) = base_files.loading_problems(stored(tmp_path), Toy(), report(unexpected_keys={name}))
    assert f"leaves out {name} → use the config.json that belongs" in str(problem)


@pytest.mark.parametrize(
    "name", ["vision.layers.0.up.weight", "score.weight", "layers.0.rotary.inv_freq", "layers.0.masked_bias"]
)
def test_weights_beside_the_model_and_old_buffers_are_not_missed(tmp_path, name):
    assert base_files.loading_problems(stored(tmp_path), Toy(), report(unexpected_keys={name})) == []


def test_missing_weights_and_other_shapes_are_both_named(tmp_path):
    info = report(
        missing_keys={f"layers.{i}.up.weight" for i in range(5)},
        mismatched_keys={("layers.1.up.weight", torch.Size([4, 2]), torch.Size([4, 4]))},
    )
    missing, shape = map(str, base_files.loading_problems(stored(tmp_path), Toy(), info))
    assert (
        "lacks weights of the model: layers.0.up.weight, layers.1.up.weight, layers.2.up.weight, and 2 more" in missing
    )
    assert "layers.1.up.weight has the shape (4, 2), but config.json gives it (4, 4)" in shape


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_weights_in_a_dtype_of_quantised_models_are_refused(tmp_path, dtype):
    (problem,) = base_files.loading_problems(stored(tmp_path, dtype), Toy(), report())
    assert "layers.0.up.weight is stored as" in str(problem) and "(and 1 more)" in str(problem)
    assert base_files.loading_problems(stored(tmp_path, torch.float16), Toy(), report()) == []
