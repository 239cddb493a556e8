"""The base model: from a name to a folder, and from a folder to the fingerprint that a checkpoint is held to."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

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
    local = Path(os.path.expanduser(name))
    if name and os.path.isdir(local):
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

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
    copies = ["consolidated*", "*/*"]  # the same weights again, in the layout of the model's authors
    try:
        found = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=copies
        )
        return Path(found)
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated, offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "check the name, log in with `hf auth login` if it is gated, or name a local folder"
        raise ConfigError(Problem(f"{hub_id} cannot be had from the hub ({reason})", field, file, remedy)) from None


def fingerprint(folder: Path) -> str:
    """Digest of weights sampled from every tensor of a model's safetensors files.

    Of each tensor, up to 4 rows spread evenly and their first 64 columns, rounded to bfloat16 so that a float32 and a
    bfloat16 copy of one model agree. Reads kilobytes, not the model.

    Raises:
        ConfigError: the folder has no safetensors weights, or they cannot be read.
    """
    lines = []
    for file in weight_files(Path(folder)):
        try:
            with safe_open(os.fspath(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    shape = tensors.get_slice(name).get_shape()
                    lines.append(f"{name} {shape} {_sample(tensors, name, shape)}\n")
        except (OSError, SafetensorError) as error:
            remedy = "download or copy the model again"
            raise ConfigError(Problem(f"cannot be read ({error})", file=str(file), remedy=remedy)) from None
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from: the index's shards, or `model.safetensors`, or all there are.

    Other safetensors files may lie beside them (an adapter, the authors' `consolidated.safetensors`).

    Raises:
        ConfigError: there are none, or the index is malformed.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(folder / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"is malformed ({type(error).__name__}: {error})"
            raise ConfigError(Problem(message, file=str(index), remedy="download or copy the model again")) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert the weights to safetensors (pickled weights are never loaded)"
        raise ConfigError(Problem("has no *.safetensors weights", file=str(folder), remedy=remedy))
    return files


def _sample(tensors: safe_open, name: str, shape: list[int]) -> str:
    if not shape or 0 in shape:
        sample = tensors.get_tensor(name).reshape(-1)
    elif len(shape) == 1:
        sample = tensors.get_slice(name)[: _ROWS * _COLUMNS]
    else:
        view = tensors.get_slice(name)
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

    Raises:
        ConfigError: its config.json or its weights are missing or malformed.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config") or {}  # of a model that sees or hears too
        architecture = str((config.get("architectures") or [text.get("model_type") or config["model_type"]])[0])
        config = config | text
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"is not a transformers config ({type(error).__name__}: {error})"
        raise ConfigError(Problem(message, file=str(path), remedy="name a folder with a transformers model")) from None
    return BaseModel(
        name=SHORT_NAMES.get(name, name),
        architecture=architecture,
        fingerprint=fingerprint(folder),
        revision=revision,
        shapes={key: config[key] for key in SHAPE_KEYS if isinstance(config.get(key), int)},
    )


def require_same_base(expected: BaseModel, folder: Path, checkpoint: Path, found: BaseModel | None = None) -> None:
    """Refuses a model that the checkpoint was not trained for.

    A shape that only one of the two configs states is left to the fingerprint, which covers the tensors' own shapes:
    transformers writes out defaults (head_dim, say) that a model's authors left away.

    Args:
        found: what `describe` says of the model, if that is known.

    Raises:
        BaseMismatch: architecture, shapes or sampled weights differ; all differences at once.
        ConfigError: as `describe`.
    """
    found = found or describe(str(folder), folder)
    remedy = f"use {expected.name}, or say --allow-other-base if you mean it"
    problems = []
    if found.architecture != expected.architecture:
        message = f"trained for {expected.architecture}, the model is {found.architecture}"
        problems.append(Problem(message, "base_model.architecture", str(checkpoint), remedy))
    for key in sorted(expected.shapes.keys() & found.shapes.keys()):
        if expected.shapes[key] != found.shapes[key]:
            message = f"trained for {expected.shapes[key]}, the model has {found.shapes[key]}"
            problems.append(Problem(message, f"base_model.shapes.{key}", str(checkpoint), remedy))
    if not problems and found.fingerprint != expected.fingerprint:
        message = f"the model in {folder} has other weights than {expected.name} had when the tasks were trained"
        problems.append(Problem(message, "base_model.fingerprint", str(checkpoint), remedy))
    if problems:
        raise BaseMismatch(problems)
