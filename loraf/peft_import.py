"""Reads a PEFT LoRA directory: adapter_config.json and adapter_model.safetensors.

    ΔW of a module = scale · B · A,  scale = lora_alpha / r, or lora_alpha / √r with use_rslora

r and lora_alpha come from rank_pattern and alpha_pattern where one of their keys matches the module's name, as in PEFT,
or the name of its weight where target_parameters names that.
Everything else that PEFT can put into a LoRA (DoRA, biases, whole modules, embeddings, a changed base model) is refused
by name. Pickled files are never read. The weights are read only once their names and shapes are known to fit.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from loraf.errors import ConfigError, Problem
from loraf.files import strict_json, strict_safetensors
from loraf.files.bounded_file import open_regular, read_bounded
from loraf.files.strict_safetensors import Entry
from loraf.limits import MAX_DIMENSION, MAX_FACTOR, MAX_NAME
from loraf.manifest import StoredFile
from loraf.peft_export import PREFIX
from loraf.system import pages

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_SHOWN = 4  # names in a message
_LARGEST_CONFIG = 1 << 24  # bytes
_MATCHING_SECONDS = 10.0  # for all patterns and modules; an honest config takes milliseconds
_BYTES_AT_ONCE = 1 << 22
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
        modules: by transformers' names; empty if `misfits` is not.
        shapes: module → (d_out, d_in).
        misfits: what `read_peft` was told against these shapes.
        rank: r of the config, which rank_pattern may override.
        base_model: name of the model that it was trained for; None if not stated.
        revision: of that model on the hub.
        file: the weights' file, with its digest.
    """

    modules: dict[str, Factors]
    shapes: dict[str, tuple[int, int]]
    misfits: list[Problem]
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
    target_parameters: tuple[str, ...] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def matched_name(self, module: str) -> str:
        """Returns the name that PEFT compares with the keys of the patterns."""
        weight = f"{module}.weight"
        by_weight = any(f".{weight}".endswith(f".{name}") for name in self.target_parameters)
        return weight if by_weight else module


Shapes = Mapping[str, tuple[int, int]]  # module → (d_out, d_in)


def read_peft(folder: Path, misfits: Callable[[Shapes], list[Problem]] = lambda shapes: []) -> PeftLora:
    """Reads a PEFT LoRA directory.

    Args:
        misfits: returns why modules of these shapes cannot be used. If it returns anything, no weight is read.

    Raises:
        ConfigError: not a valid PEFT LoRA, or it is more than scale · B · A. Lists all problems.
    """
    problems: list[Problem] = []
    config = _read_config(folder / CONFIG, problems)
    path = folder / WEIGHTS
    modules: dict[str, Factors] = {}
    unfit: list[Problem] = []
    shapes: dict[str, tuple[int, int]] = {}
    file = None
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            start = strict_safetensors.header_end(head, size)
            head += stream.read(start - 8)
            entries = strict_safetensors.parse_header(head[8:], size - start)
            pairs = _pairs(entries, str(path), problems)
            if config is not None:
                names = {module: config.matched_name(module) for module in pairs}
                ranks = _by_pattern(config.rank_pattern, "rank_pattern", names, config.r, path, problems)
                alphas = _by_pattern(config.alpha_pattern, "alpha_pattern", names, config.lora_alpha, path, problems)
                shapes = _shapes(pairs, ranks, str(path), problems)
                unfit = misfits(shapes)
                file = StoredFile(WEIGHTS, size, "")
                if not problems and not unfit:
                    tensors, file = _read(stream, head, entries, size)
                    modules = _factors(config, pairs, tensors, ranks, alphas, str(path), problems)
    except OSError as error:
        problems.append(_unreadable(path, error))
    except ValueError as error:
        problems.append(Problem(f"is not a safetensors file ({error})", file=str(path), remedy="save or copy it again"))
    if problems or config is None or file is None:
        raise ConfigError(problems)
    return PeftLora(modules, shapes, unfit, config.r, config.base_model_name_or_path, config.revision, file)


def _by_pattern(
    pattern: Mapping[str, Any],
    field: str,
    names: Mapping[str, str],
    default: Any,
    weights: Path,
    problems: list[Problem],
) -> dict[str, Any]:
    """Returns module → the value of the first key that matches its whole name, or its end after a dot; else `default`.

    Like PEFT's `get_pattern_key`, which uses `re`. Matching may take exponential time there; `regex` can stop it.

    Args:
        names: module → the name to match.
    """
    import regex

    end = time.monotonic() + _MATCHING_SECONDS
    values: dict[str, Any] = {}
    try:
        keys = {key: regex.compile(rf"(.*\.)?({key})$") for key in pattern}
        for module, name in names.items():
            # PEFT falls back to the name itself as the key, which then is none of the pattern's.
            left = max(1e-3, end - time.monotonic())
            key = next((key for key, keyed in keys.items() if keyed.match(name, timeout=left)), name)
            values[module] = pattern.get(key, default)
            if time.monotonic() > end:
                raise TimeoutError
    except (TimeoutError, regex.error, RecursionError, OverflowError, MemoryError) as error:
        reason = f"a key cannot be used ({error})"
        if isinstance(error, TimeoutError):
            reason = "matching its keys with the modules' names takes too long"
        config = str(weights.with_name(CONFIG))
        problems.append(Problem(reason, field, config, "write the modules' names, without nested repetitions"))
        return dict.fromkeys(names, default)
    return values


def _read_config(path: Path, problems: list[Problem]) -> _Config | None:
    """Returns the config, or None after adding to `problems`."""
    remedy = "name a folder that PEFT's save_pretrained wrote"
    try:
        content = strict_json.loads(read_bounded(path, _LARGEST_CONFIG))
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
    # Names of weights stand for their layers; the tensors' shapes are checked.
    if config is not None and not all(name.endswith(".weight") for name in config.target_parameters):
        report("target_parameters", _MEANING["target_parameters"], _RETRAIN)
    for key, value in stated.items():
        if key not in known | _IGNORED_FIELDS and value not in (False, [], {}, ""):
            report(key, _MEANING.get(key, "changes how the adapter works, and a task does not support it"), _RETRAIN)
    return config if len(problems) == before else None


def _check_numbers(config: _Config, report: Callable[[str, str], None]) -> None:
    for where, rank in (("r", config.r), *((f"rank_pattern.{k}", r) for k, r in config.rank_pattern.items())):
        if not 1 <= rank <= MAX_DIMENSION:
            report(where, f"{rank} is not a valid rank")
    alphas = (("lora_alpha", config.lora_alpha), *((f"alpha_pattern.{k}", a) for k, a in config.alpha_pattern.items()))
    for where, alpha in alphas:
        if not abs(alpha) <= MAX_FACTOR:
            report(where, f"{alpha} is out of range")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            try:
                re.compile(key)
                re.compile(rf"(.*\.)?({key})$")
                if len(key) > MAX_NAME:
                    raise ValueError(f"it is longer than {MAX_NAME} characters")
            except (re.error, RecursionError, OverflowError, ValueError) as error:
                report(name, f"{key[:MAX_NAME]!r} is not a valid pattern ({error})")


def _unreadable(path: Path, error: OSError) -> Problem:
    if path.with_name("adapter_model.bin").exists():
        message = "is missing. There is an adapter_model.bin, but pickled files are never read"
        return Problem(message, file=str(path), remedy="load the adapter with PEFT and save it again as safetensors")
    remedy = "name a folder that PEFT's save_pretrained wrote"
    return Problem(f"cannot be read ({error.strerror})", file=str(path), remedy=remedy)


def _read(stream: FileIO, head: bytes, entries: list[Entry], size: int) -> tuple[dict[str, torch.Tensor], StoredFile]:
    """Returns the tensors after the header `head`, and the digest of the whole file. Raises OSError, ValueError."""
    sha = hashlib.sha256(head)
    data = strict_safetensors.bytes_of(pages(size - len(head)))
    at = 0
    while at < len(data) and (count := stream.readinto(data[at : at + _BYTES_AT_ONCE])):
        sha.update(data[at : at + count])
        at += count
    if at < len(data):
        raise ValueError("it was changed while it was read")
    tensors = {e.name: strict_safetensors.tensor_at(data, e.first, e.last, e.dtype, e.shape) for e in entries}
    return tensors, StoredFile(WEIGHTS, size, sha.hexdigest())


def _pairs(entries: list[Entry], file: str, problems: list[Problem]) -> dict[str, dict[str, Entry]]:
    """Returns module → "A" and "B" → tensor. Adds whatever else the file holds to `problems`."""
    by_module: dict[str, dict[str, Entry]] = {}
    unexpected = []
    for entry in entries:
        match = _TENSOR.fullmatch(entry.name)
        if match is None:
            unexpected.append(entry.name)
        else:
            by_module.setdefault(match["module"], {})[match["part"]] = entry
    if unexpected:
        message = f"holds tensors other than lora_A and lora_B of linear layers: {shown(unexpected)}"
        problems.append(Problem(message, file=file, remedy=_RETRAIN))
    if not by_module:
        problems.append(Problem("holds no adapted layer", file=file, remedy="name a trained adapter"))
    return by_module


def _shapes(
    pairs: Mapping[str, Mapping[str, Entry]], ranks: Mapping[str, int], file: str, problems: list[Problem]
) -> dict[str, tuple[int, int]]:
    """Returns the shape of every module. Adds whatever is wrong with its two tensors to `problems`."""
    shapes = {}
    for module, parts in pairs.items():
        fault = _fault(parts, ranks[module])
        if fault:
            problems.append(Problem(fault, module, file, "save or copy it again"))
        else:
            shapes[module] = (parts["B"].shape[0], parts["A"].shape[1])
    return shapes


def _fault(parts: Mapping[str, Entry], rank: int) -> str | None:
    if len(parts) != 2:
        return f"has lora_{next(iter(parts))} only"
    for part, entry in sorted(parts.items()):
        if entry.dtype not in DTYPES:
            return f"lora_{part} is {entry.dtype}, not one of {', '.join(map(str, DTYPES))}"
        if len(entry.shape) != 2 or entry.shape["AB".index(part)] != rank:
            return f"lora_{part} is {entry.shape}, but the config says rank {rank}"
        if not all(0 < size <= MAX_DIMENSION for size in entry.shape):
            return f"lora_{part} is {entry.shape}, which is no layer's"
    return None


def _factors(
    config: _Config,
    pairs: Mapping[str, Mapping[str, Entry]],
    tensors: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    file: str,
    problems: list[Problem],
) -> dict[str, Factors]:
    """Returns A and B of every module. Adds whatever is wrong with their values to `problems`."""
    modules = {}
    for module, parts in pairs.items():
        a, b = (tensors[parts[part].name] for part in "AB")
        for part, tensor in (("A", a), ("B", b)):
            if not bool(torch.isfinite(tensor).all()):
                fault = f"lora_{part} has a value that is not finite"
                problems.append(Problem(fault, module, file, "save or copy it again"))
        modules[module] = Factors(a, b, config.scale(ranks[module], alphas[module]))
    if not any(factors.scale for factors in modules.values()):
        message = "is 0 everywhere: the adapter has no effect"
        config_file = str(Path(file).with_name(CONFIG))
        problems.append(Problem(message, "lora_alpha", config_file, "use the value from training"))
    return modules


def shown(names: list[str]) -> str:
    """Lists the first few of many names."""
    more = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
