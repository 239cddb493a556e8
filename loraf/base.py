"""The base model: from a name to a folder, and from a folder to the fingerprint that a checkpoint is held to."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open

from loraf.errors import BaseMismatch, ConfigError, Problem
from loraf.manifest import BaseModel

SHORT_NAMES = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "gemma-7b": "google/gemma-7b",
}
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_ROWS, _COLUMNS = 4, 64


def resolve(name: str, revision: str | None = None, file: str = "", field: str = "model") -> Path:
    """The folder of a model: a local folder, `tiny` (the embedded model), a short name, or a hub id.

    A hub id is downloaded into the hub's cache (safetensors, tokenizer and config only).

    Raises:
        ConfigError: neither a folder nor a model that the hub (or its cache, when offline) gives.
    """
    if name == "tiny":
        return Path(str(resources.files("loraf").joinpath("data/tiny")))
    local = Path(name).expanduser()
    if local.is_dir():
        if (local / "config.json").is_file():
            return local
        raise ConfigError(Problem(f"{name} has no config.json", field, file, "name a folder with a transformers model"))
    hub_id = SHORT_NAMES.get(name, name)
    looks_local = name.startswith((".", "/", "~")) or hub_id.count("/") != 1
    if looks_local:
        known = ", ".join(["tiny", *SHORT_NAMES])
        remedy = f"name a local folder, a hub id such as org/model, or one of: {known}"
        raise ConfigError(Problem(f"there is no model {name!r}", field, file, remedy))
    import huggingface_hub  # only here: most uses never reach a hub

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated, offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "check the name, log in with `hf auth login` if it is gated, or name a local folder"
        raise ConfigError(Problem(f"{hub_id} cannot be had from the hub ({reason})", field, file, remedy)) from None


def fingerprint(folder: Path) -> str:
    """Digest of weights sampled from every tensor of a model's safetensors files.

    Of each tensor, up to 4 rows spread evenly and their first 64 columns, rounded to bfloat16 so that a float32 and a
    bfloat16 copy of one model agree. Reads kilobytes, not the model.

    Raises:
        ConfigError: the folder has no safetensors weights.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        remedy = "convert the weights to safetensors (pickled weights are never loaded)"
        raise ConfigError(Problem("has no *.safetensors weights", file=str(folder), remedy=remedy))
    lines = []
    for file in files:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            for name in tensors.keys():
                view = tensors.get_slice(name)
                shape = view.get_shape()
                lines.append(f"{name} {shape} {_sample(view, shape)}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _sample(view, shape: list[int]) -> str:
    if not shape:
        sample = view[:].reshape(1)
    elif len(shape) == 1:
        sample = view[: _ROWS * _COLUMNS]
    else:
        count = min(_ROWS, shape[0])
        rows = sorted({(2 * i + 1) * shape[0] // (2 * count) for i in range(count)})
        sample = torch.cat([view[row : row + 1].reshape(-1)[:_COLUMNS] for row in rows])
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def describe(name: str, folder: Path, revision: str | None = None) -> BaseModel:
    """What a checkpoint records of its base model.

    Args:
        name: as the user wrote it (a hub id, a short name, a folder).
        folder: where `resolve` found it.
    """
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return BaseModel(
        name=SHORT_NAMES.get(name, name),
        architecture=architectures[0],
        fingerprint=fingerprint(folder),
        revision=revision,
        shapes={key: config[key] for key in SHAPE_KEYS if isinstance(config.get(key), int)},
    )


def require_same_base(expected: BaseModel, folder: Path, checkpoint: Path) -> None:
    """Refuses a model that the checkpoint was not trained for.

    Raises:
        BaseMismatch: architecture, shapes or sampled weights differ; all differences at once.
    """
    found = describe(str(folder), folder)
    remedy = f"use {expected.name}, or say --allow-other-base if you mean it"
    problems = []
    if found.architecture != expected.architecture:
        message = f"trained for {expected.architecture}, the model is {found.architecture}"
        problems.append(Problem(message, "base_model.architecture", str(checkpoint), remedy))
    for key in expected.shapes.keys() | found.shapes.keys():
        if expected.shapes.get(key) != found.shapes.get(key):
            message = f"trained for {expected.shapes.get(key)}, the model has {found.shapes.get(key)}"
            problems.append(Problem(message, f"base_model.shapes.{key}", str(checkpoint), remedy))
    if not problems and found.fingerprint != expected.fingerprint:
        message = f"the model in {folder} has other weights than {expected.name} had when the tasks were trained"
        problems.append(Problem(message, "base_model.fingerprint", str(checkpoint), remedy))
    if problems:
        raise BaseMismatch(problems)
