"""Whether a base model's files are whole and are what its config says, before and after a library loads them.

`problems` reads configs and the headers of the weights, never a tensor. `loading_problems` judges what transformers
reports of a load. Whoever loads a base (the trainer, an export, a server) asks both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loraf.base_model import require_no_adapter, weight_files
from loraf.errors import ConfigError, Problem, one_line

_AGAIN = "download or copy the model again"
_NAMED = 3  # names that a message lists
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


def problems(folder: Path) -> list[Problem]:
    """Returns everything that keeps a model from being loaded as plain safetensors weights; empty if nothing does.

    An adapter beside it, quantised weights, pickled weights only, missing or damaged files.
    """
    found = [*_quantisation(folder), *_generation(folder), *_weights(folder)]
    try:
        require_no_adapter(folder)
    except ConfigError as error:
        found += error.problems
    return found


def require_loadable(folder: Path) -> None:
    """Raises ConfigError with all `problems`, if there are any."""
    found = problems(folder)
    if found:
        raise ConfigError(found)


# --- before loading ---------------------------------------------------------------------------------------------


def _quantisation(folder: Path) -> Iterator[Problem]:
    """A problem if config.json says that the weights are quantised, whether they are or not."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        parts = [("", config), *((f"{key}.", part) for key, part in config.items() if isinstance(part, dict))]
    except (OSError, ValueError, AttributeError) as error:
        yield Problem(f"cannot be read ({one_line(error)})", file=str(file), remedy=_AGAIN)
        return
    for prefix, part in parts:
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                method = part[key].get("quant_method") if isinstance(part[key], dict) else part[key]
                message = (
                    f"the weights are quantised ({method or 'by an unnamed method'}), and ΔW is added to plain ones"
                )
                remedy = f"use the model's unquantised weights; if these are plain, remove {key} from config.json"
                yield Problem(message, f"{prefix}{key}", str(file), remedy)


def _generation(folder: Path) -> Iterator[Problem]:
    """A problem if generation_config.json holds JSON other than an object; what is not JSON, transformers skips."""
    file = folder / "generation_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(content, dict):
        yield Problem("is not a JSON object", file=str(file), remedy="copy the model's own file, or remove it")


def _weights(folder: Path) -> Iterator[Problem]:
    whole, index = folder / "model.safetensors", folder / _INDEX
    if not whole.is_file() and not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        has = f" but {listed(pickles)}, and pickled weights are never loaded" if pickles else ""
        remedy = "convert the weights to safetensors with save_pretrained" if pickles else "complete the download"
        yield Problem(f"has no model.safetensors{has}", file=str(folder), remedy=remedy)
        return
    try:
        files = weight_files(folder)
    except ConfigError as error:
        yield from error.problems
        return
    missing = [os.fspath(file.relative_to(folder)) for file in files if not file.is_file()]
    if missing:
        message = f"{len(missing)} of the {len(files)} files that it names are not there: {listed(missing)}"
        yield Problem(message, file=str(index), remedy="complete the download of the model")
    held: dict[Path, set[str]] = {}
    for file in files:
        if file.is_file():
            try:
                held[file] = set(tensors_in(file))
            except (OSError, SafetensorError) as error:
                yield Problem(f"cannot be read ({one_line(error)})", file=str(file), remedy=_AGAIN)
    if whole not in files and len(held) == len(files):
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        lost = sorted(name for name, file in placed.items() if name not in held[folder / file])
        if lost:
            message = f"names {listed(lost)}, but the weights are not in the files that it names for them"
            yield Problem(message, file=str(index), remedy=_AGAIN)


def tensors_in(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns the dtype, by safetensors' name for it, and the shape of each tensor in a file, from its header alone.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(os.fspath(file), framework="pt") as tensors:
        slices = ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices}


def without_values(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights as tensors on the `meta` device, which have a shape and a dtype but no values.

    Weights in dtypes other than float64, float32, float16 and bfloat16 get the right shape and float32:
    `loading_problems` reports them.

    Raises:
        ConfigError: the folder has no safetensors weights.
        OSError, SafetensorError: they cannot be read.
    """
    return {
        name: torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float32), device="meta")
        for file in weight_files(folder)
        for name, (dtype, shape) in tensors_in(file).items()
    }


# --- after loading ----------------------------------------------------------------------------------------------


def loading_problems(
    folder: Path, model: nn.Module, report: Mapping[str, Any], quantised: bool = False
) -> list[Problem]:
    """Returns where weights and model differ, after transformers has loaded the one into the other.

    Args:
        model: as it was loaded, with `config` of transformers.
        report: transformers' loading info: the sets `missing_keys`, `unexpected_keys`, `mismatched_keys`.
        quantised: it was quantised while it was loaded, so its weights are not plain.
    """
    found = []
    missing = sorted(report["missing_keys"])
    if missing:
        message = f"lacks weights of the model: {listed(missing)}"
        remedy = "use a complete causal language model: complete its download, or correct its config.json"
        found.append(Problem(message, file=str(folder), remedy=remedy))
    mismatched = sorted((name, tuple(stored), tuple(shape)) for name, stored, shape in report["mismatched_keys"])
    if mismatched:
        name, stored, shape = mismatched[0]
        more = f" (and {len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        message = f"the weight {name} has the shape {stored}, but config.json gives it {shape}{more}"
        remedy = "use the config.json that belongs to the weights"
        found.append(Problem(message, file=str(folder), remedy=remedy))
    left = _left_out(model, report["unexpected_keys"])
    if left:
        message = f"config.json describes a smaller model than the weights are: it leaves out {listed(left)}"
        remedy = "use the config.json that belongs to the weights"
        found.append(Problem(message, file=str(folder), remedy=remedy))
    packed = [] if quantised else _quantised(folder, model)
    if packed:
        name, dtype = packed[0]
        more = f" (and {len(packed) - 1} more)" if len(packed) > 1 else ""
        message = f"the weight {name} is stored as {dtype}{more}, and ΔW is added to plain weights"
        found.append(Problem(message, file=str(folder), remedy="use the model's unquantised weights"))
    return found


def _left_out(model: nn.Module, unexpected: Collection[str]) -> list[str]:
    """The weights that belong to parts of the model as its config describes it, and yet have no place in it.

    More layers than it has; a bias of a layer without one; a weight of a module in a layer that has no such module.
    What stands beside the layers (a vision tower, a classification head) is another matter, as are buffers that older
    versions of transformers stored, and the layers for predicting several tokens, which transformers never loads.
    """
    modules = dict(model.named_modules())
    known = {_NUMBER.sub("*", name) for name in model.state_dict()}
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    layers, ahead = getattr(text, "num_hidden_layers", None), getattr(text, "num_nextn_predict_layers", None) or 0

    def is_left_out(name: str) -> bool:
        if (
            ahead
            and isinstance(layers, int)
            and {int(n) for n in _NUMBER.findall(name)} & {*range(layers, layers + ahead)}
        ):
            return False
        module, _, leaf = name.rpartition(".")
        if _NUMBER.sub("*", name) in known or leaf in getattr(modules.get(module), "_parameters", ()):
            return True
        parent = module.rpartition(".")[0]
        return leaf == "weight" and parent in modules and _NUMBER.search(parent) is not None and module not in modules

    return sorted(filter(is_left_out, unexpected))


def _quantised(folder: Path, model: nn.Module) -> list[tuple[str, str]]:
    """(name, dtype) of weights that are not stored as plain floating-point numbers, but are so in the model."""
    plain = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    known = plain | {name.partition(".")[2] for name in plain}  # some files leave out the name of the model's body
    return sorted(
        (name, dtype)
        for file in weight_files(folder)
        for name, (dtype, _) in tensors_in(file).items()
        if dtype not in _DTYPES and (name in known or name.partition(".")[2] in known)
    )


def listed(names: Collection[str]) -> str:
    """Returns the first few of several names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
