"""The base model: resolving its name to a folder, and the fingerprint that ties a checkpoint to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from loraf.errors import BaseMismatch, ConfigError, Problem
from loraf.hub import download, local_revision, revision_problem
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
# What transformers reads of a model and its tokenizer. Never pickles (*.bin, *.pt) or code (*.py).
_WANTED = (
    *("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "tokenizer.model.*", "*.tiktoken", "*.spm"),
    *("*.tokenizer", "bpe.codes"),
)
# The same weights again, in the layout of the model's authors or of other programs. Chat templates have a folder.
_COPIES = ("consolidated*", *(f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"))


class _TensorReader(Protocol):
    """The part of `safe_open` that is used here; its own methods have no types."""

    def get_tensor(self, name: str) -> torch.Tensor: ...

    def get_slice(self, name: str) -> Any: ...


def resolve(
    name: str, revision: str | None = None, file: str = "", field: str = "model", config_only: bool = False
) -> Path:
    """Returns the folder of a model: a local folder, `tiny` (the embedded model), a short name, or a hub id.

    Models on the hub are downloaded into its cache (safetensors, tokenizer and config only).

    Args:
        revision: on the hub, a branch, tag or commit.
        file, field: for error messages.
        config_only: download no more of a model on the hub than its config.json.

    Raises:
        ConfigError: not a model folder, and not available from the hub (or, offline, its cache); or an adapter lies
            beside the model.
    """
    folder = _resolve(name, revision, file, field, config_only)
    require_no_adapter(folder)
    return folder


def require_revision(name: str, revision: str, field: str) -> None:
    """Checks that a model can have a revision: that it is on the hub.

    Args:
        name: as for `resolve`.
        field: for error messages.

    Raises:
        ConfigError: it is a local folder or `tiny`, or the revision is malformed.
    """
    problem = revision_problem(revision, field)
    if name == "tiny":
        remedy = "leave the revision out, or name a model on the hub"
        problem = Problem("tiny is part of loraf and has no revisions", field, remedy=remedy)
    elif name and os.path.isdir(os.path.expanduser(name)):
        problem = local_revision(name, field)
    if problem:
        raise ConfigError(problem)


def require_no_adapter(folder: Path) -> None:
    """Checks that no PEFT adapter lies in a model's folder.

    transformers would add it to the model without a word, vLLM would not, and `fingerprint` does not see it.

    Raises:
        ConfigError: one does.
    """
    config = folder / "adapter_config.json"
    if os.path.lexists(config):
        message = "is an adapter in the base model's folder, which some programs add to the model and others do not"
        remedy = "move it and its weights to another folder, or merge them into the model"
        raise ConfigError(Problem(message, file=str(config), remedy=remedy))


def _resolve(name: str, revision: str | None, file: str, field: str, config_only: bool) -> Path:
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
    return download(
        hub_id,
        ["config.json"] if config_only else _WANTED,
        leave_out=_COPIES,
        revision=revision,
        field=field,
        file=file,
    )


def fingerprint(folder: Path) -> str:
    """Computes the digest of weights sampled from every tensor of a model's safetensors files.

    From each tensor it takes up to 4 evenly spread rows and their first 64 columns, rounded to bfloat16 so that
    float32 and bfloat16 copies of a model agree. This reads kilobytes, not the whole model.

    Raises:
        ConfigError: the folder has no safetensors weights, or they cannot be read.
    """
    lines = []
    for file in weight_files(Path(folder)):
        try:
            with safe_open(os.fspath(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    shape = tensors.get_slice(name).get_shape()
                    lines.append(f"{name} {shape} {_sample(tensors, name, shape)}\n")
        except (OSError, SafetensorError) as error:
            remedy = "download or copy the model again"
            raise ConfigError(Problem(f"cannot be read ({error})", file=str(file), remedy=remedy)) from None
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def sampled_rows(folder: Path, names: Collection[str]) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Reads the part of some weights that `fingerprint` is computed from.

    Args:
        names: of matrices; those that the files do not have by these names are left out.

    Returns:
        Name → the rows' numbers, and (rows, up to 64 columns) bfloat16.

    Raises:
        ConfigError: see `weight_files`; or a file cannot be read.
    """
    samples = {}
    for file in weight_files(Path(folder)):
        try:
            with safe_open(os.fspath(file), framework="pt") as tensors:
                for name in [name for name in tensors.keys() if name in names]:  # noqa: SIM118 - not a mapping
                    view = tensors.get_slice(name)
                    shape = view.get_shape()
                    if len(shape) == 2 and 0 not in shape:
                        rows = _rows(shape)
                        sample = torch.cat([view[row : row + 1, :_COLUMNS] for row in rows])
                        samples[name] = (rows, sample.to(torch.bfloat16))
        except (OSError, SafetensorError) as error:
            remedy = "download or copy the model again"
            raise ConfigError(Problem(f"cannot be read ({error})", file=str(file), remedy=remedy)) from None
    return samples


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads weights from: `model.safetensors`, the index's shards, or all files.

    The folder may hold other safetensors files too (an adapter, the authors' `consolidated.safetensors`).

    Raises:
        ConfigError: no weights, or a malformed index.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in names if not _is_within(name)]
            if outside or not names:
                raise ValueError(f"{min(outside)!r} is no safetensors file in the folder" if outside else "it is empty")
            return sorted(folder / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"is malformed ({type(error).__name__}: {error})"
            raise ConfigError(Problem(message, file=str(index), remedy="download or copy the model again")) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert the weights to safetensors (pickled weights are never loaded)"
        raise ConfigError(Problem("has no *.safetensors weights", file=str(folder), remedy=remedy))
    return files


def _is_within(name: str) -> bool:
    """Whether a name in an index is that of a safetensors file in the model's folder or in one below it."""
    path = PurePosixPath(name)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts


def _sample(tensors: _TensorReader, name: str, shape: list[int]) -> str:
    if not shape or 0 in shape:
        sample = tensors.get_tensor(name).reshape(-1)
    elif len(shape) == 1:
        sample = tensors.get_slice(name)[: _ROWS * _COLUMNS]
    else:
        view = tensors.get_slice(name)
        sample = torch.cat([view[row : row + 1].reshape(-1)[:_COLUMNS] for row in _rows(shape)])
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _rows(shape: list[int]) -> list[int]:
    """The numbers of the rows that are sampled of a tensor."""
    count = min(_ROWS, shape[0])
    return sorted({(2 * i + 1) * shape[0] // (2 * count) for i in range(count)})


def describe(name: str, folder: Path, revision: str | None = None) -> BaseModel:
    """Describes a base model the way a checkpoint records it.

    Args:
        name: as the user wrote it (a hub id, a short name, a folder).
        folder: as `resolve` returned it.

    Raises:
        ConfigError: its config.json or its weights are missing or malformed, or an adapter lies beside it.
    """
    require_no_adapter(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config") or {}  # of a multimodal model
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


def require_same_base(expected: BaseModel, folder: Path, checkpoint: Path, actual: BaseModel | None = None) -> None:
    """Checks that a model is the one that the checkpoint was trained for.

    A shape that only one of the two configs states is covered by the fingerprint, which includes the tensors' shapes:
    transformers writes out defaults (such as head_dim) that the model's authors left out.

    Args:
        expected: the checkpoint's base model.
        folder: of the model to check.
        checkpoint: for error messages.
        actual: the result of `describe(folder)`, if it is known.

    Raises:
        BaseMismatch: architecture, shapes or sampled weights differ. Lists all differences.
        ConfigError: see `describe`.
    """
    actual = actual or describe(str(folder), folder)
    remedy = f"use {expected.name}, or pass --allow-other-base if you mean it"
    problems = []
    if actual.architecture != expected.architecture:
        message = f"trained for {expected.architecture}, but the model is {actual.architecture}"
        problems.append(Problem(message, "base_model.architecture", str(checkpoint), remedy))
    for key in sorted(expected.shapes.keys() & actual.shapes.keys()):
        if expected.shapes[key] != actual.shapes[key]:
            message = f"trained for {expected.shapes[key]}, but the model has {actual.shapes[key]}"
            problems.append(Problem(message, f"base_model.shapes.{key}", str(checkpoint), remedy))
    if not problems and actual.fingerprint != expected.fingerprint:
        message = f"the model in {folder} has other weights than {expected.name} had when the tasks were trained"
        problems.append(Problem(message, "base_model.fingerprint", str(checkpoint), remedy))
    if problems:
        raise BaseMismatch(problems)
