"""Reads a PEFT LoRA directory: adapter_config.json and adapter_model.safetensors.

    ΔW of a module = scale · B · A,  scale = lora_alpha / r, or lora_alpha / √r with use_rslora

r and lora_alpha come from rank_pattern and alpha_pattern where one of their keys matches the module's name, as in PEFT.
Everything else that PEFT can put into a LoRA (DoRA, biases, whole modules, embeddings, a changed base model) is refused
by name. Pickled files are never read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraf import strict_json, strict_safetensors
from loraf.errors import ConfigError, Problem
from loraf.manifest import StoredFile
from loraf.peft_export import PREFIX

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_SHOWN = 4  # names in a message
_RETRAIN = "train the task on its data with `loraf-train run`"

# Fields of LoraConfig in peft 0.21 that ΔW does not depend on, apart from those of _Config.
_IGNORED_FIELDS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("fan_in_fan_out", "ensure_weight_tying", "runtime_config", "megatron_config", "megatron_core"),
    # How A and B were initialized or trained. The weights hold the result.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
}
# Values of init_lora_weights that leave the base model unchanged. Others (pissa, olora, …) change its weights.
_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
_MEANING = {
    "use_dora": "DoRA scales the columns of the whole weight",
    "modules_to_save": "whole modules were trained together with the adapter",
    "trainable_token_indices": "rows of the embedding were trained together with the adapter",
    "lora_bias": "B has a bias",
    "layer_replication": "layers of the base model are used several times",
    "alora_invocation_tokens": "it is active only after its invocation tokens",
    "target_parameters": "it adapts parameters other than weights of linear layers",
}


@dataclass(frozen=True)
class Factors:
    """The factors of one module's ΔW = scale · b · a, where a is (rank, d_in) and b is (d_out, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class PeftLora:
    """A LoRA, read from a PEFT directory.

    Attributes:
        modules: by transformers' names.
        rank: r of the config, which rank_pattern may override.
        base_model: name of the model that it was trained for; None if not stated.
        revision: of that model on the hub.
        file: the weights' file, with its digest.
    """

    modules: dict[str, Factors]
    rank: int
    base_model: str | None
    revision: str | None
    file: StoredFile


@dataclass(frozen=True)
class _Config:
    """The fields of adapter_config.json that ΔW depends on, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scale_of(self, module: str) -> float:
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft(folder: Path) -> PeftLora:
    """Reads a PEFT LoRA directory.

    Raises:
        ConfigError: not a valid PEFT LoRA, or it is more than scale · B · A. Lists all problems.
    """
    problems: list[Problem] = []
    config = _read_config(folder / CONFIG, problems)
    tensors, file = _read_weights(folder, problems)
    modules = {}
    if config is not None and tensors is not None:
        modules = _pair(config, tensors, str(folder / WEIGHTS), problems)
    if problems or config is None or file is None:
        raise ConfigError(problems)
    return PeftLora(modules, config.r, config.base_model_name_or_path, config.revision, file)


def _matching(pattern: Mapping[str, Any], module: str) -> str:
    """Returns the first key that matches the whole name, or its end after a dot. Like PEFT's `get_pattern_key`."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)


def _read_config(path: Path, problems: list[Problem]) -> _Config | None:
    """Returns the config, or None after adding to `problems`."""
    remedy = "name a folder that PEFT's save_pretrained wrote"
    try:
        content = strict_json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except OSError as error:
        problems.append(Problem(f"cannot be read ({error.strerror})", file=str(path), remedy=remedy))
        return None
    except ValueError as error:
        problems.append(Problem(f"is not JSON ({error})", file=str(path), remedy=remedy))
        return None
    before = len(problems)

    def report(where: str, message: str, remedy: str = remedy) -> None:
        problems.append(Problem(message, where, str(path), remedy))

    kind = content.get("peft_type")
    if kind != "LORA":
        report("peft_type", f"is {kind!r}, not 'LORA'", _RETRAIN)
        return None
    stated = {key: value for key, value in content.items() if value is not None}
    known = _Config.__dataclass_fields__.keys()
    config = strict_json.build(_Config, {key: stated[key] for key in stated if key in known}, "", report)
    if config is not None:
        _check_numbers(config, report)
    if stated.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        remedy = "import an adapter of a causal language model"
        report("task_type", f"is {stated['task_type']!r}, not 'CAUSAL_LM'", remedy)
    if stated.get("bias", "none") != "none":
        message = f"is {stated['bias']!r}: biases of the base model were trained together with the adapter"
        report("bias", message, _RETRAIN)
    initialization = stated.get("init_lora_weights")
    if initialization not in _KEEPS_BASE:
        message = f"is {initialization!r}: the adapter belongs to a base model with other weights"
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        report("init_lora_weights", message, remedy)
    for key, value in stated.items():
        if key not in known | _IGNORED_FIELDS and value not in (False, [], {}, ""):
            report(key, _MEANING.get(key, "changes how the adapter works, and a task does not support it"), _RETRAIN)
    return config if len(problems) == before else None


def _check_numbers(config: _Config, report: Callable[[str, str], None]) -> None:
    for where, rank in (("r", config.r), *((f"rank_pattern.{k}", r) for k, r in config.rank_pattern.items())):
        if rank < 1:
            report(where, f"{rank} is not a valid rank")
    for key in (*config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(key)
        except re.error as error:
            where = "rank_pattern" if key in config.rank_pattern else "alpha_pattern"
            report(where, f"{key!r} is not a valid pattern ({error})")


def _read_weights(folder: Path, problems: list[Problem]) -> tuple[dict[str, torch.Tensor] | None, StoredFile | None]:
    """Returns the tensors and the digest of their file, or (None, None) after adding to `problems`."""
    path = folder / WEIGHTS
    try:
        data = bytearray(path.read_bytes())
        tensors = strict_safetensors.parse(memoryview(data))
    except OSError as error:
        message, remedy = f"cannot be read ({error.strerror})", "name a folder that PEFT's save_pretrained wrote"
        if (folder / "adapter_model.bin").exists():
            message = "is missing. There is an adapter_model.bin, but pickled files are never read"
            remedy = "load the adapter with PEFT and save it again as safetensors"
        problems.append(Problem(message, file=str(path), remedy=remedy))
        return None, None
    except ValueError as error:
        problems.append(Problem(f"is not a safetensors file ({error})", file=str(path), remedy="save or copy it again"))
        return None, None
    return tensors, StoredFile(WEIGHTS, len(data), hashlib.sha256(data).hexdigest())


def _pair(
    config: _Config, tensors: Mapping[str, torch.Tensor], file: str, problems: list[Problem]
) -> dict[str, Factors]:
    """Returns A and B of every module. Adds whatever is wrong to `problems`."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    unexpected = []
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            unexpected.append(name)
        else:
            by_module.setdefault(match["module"], {})[match["part"]] = tensor
    if unexpected:
        message = f"holds tensors other than lora_A and lora_B of linear layers: {shown(unexpected)}"
        problems.append(Problem(message, file=file, remedy=_RETRAIN))
    if not by_module:
        problems.append(Problem("holds no adapted layer", file=file, remedy="name a trained adapter"))
    modules = {}
    for module, parts in by_module.items():
        fault = _fault(parts, config.rank_of(module))
        if fault:
            problems.append(Problem(fault, module, file, "save or copy it again"))
        else:
            modules[module] = Factors(parts["A"], parts["B"], config.scale_of(module))
    if modules and not any(factors.scale for factors in modules.values()):
        message = "is 0 everywhere: the adapter has no effect"
        config_file = str(Path(file).with_name(CONFIG))
        problems.append(Problem(message, "lora_alpha", config_file, "use the value from training"))
    return modules


def _fault(parts: Mapping[str, torch.Tensor], rank: int) -> str | None:
    if len(parts) != 2:
        return f"has lora_{next(iter(parts))} only"
    for part, tensor in sorted(parts.items()):
        if tensor.dtype not in DTYPES:
            return f"lora_{part} is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}"
        if tensor.ndim != 2 or tensor.shape["AB".index(part)] != rank:
            return f"lora_{part} is {list(tensor.shape)}, but the config says rank {rank}"
        if not bool(torch.isfinite(tensor).all()):
            return f"lora_{part} has a value that is not finite"
    return None


def shown(names: list[str]) -> str:
    """Lists the first few of many names."""
    more = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
