"""Writes a base model with a task set merged into its weights, as transformers reads it.

What cannot be written is found from the config and the headers of the weight files, before any weight is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from loraf import base_files
from loraf.delta import Merger, shared_weights, target_modules
from loraf.errors import ConfigError, Problem, one_line
from loraf_train.sequence.base_checks import build_without_weights, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from loraf.checkpoint import Checkpoint
    from loraf.tasksets import TaskSet

_GENERATION = "generation_config.json"


def write_merged(
    checkpoint: Checkpoint, task_set: TaskSet, base_folder: Path, out: Path, dtype: torch.dtype | None = None
) -> None:
    """Sums in float32 or wider, from the base's own numbers, and rounds once.

    A target that shares its weight with the embedding (a tied lm_head) gets a weight of its own, and the written config
    says `tie_word_embeddings: false`. The generation config is the base's file, unchanged.

    Args:
        out: a folder that does not exist yet.
        dtype: of the written weights, but for those that transformers always keeps in float32; None: the base's own.

    Raises:
        ConfigError: the base cannot be loaded or written.
        BaseMismatch: the checkpoint does not fit the base.
    """
    file = base_folder / "config.json"
    base_files.require_loadable(base_folder)
    tokenizer = load_tokenizer(base_folder)
    planned = build_without_weights(base_folder)
    dict(target_modules(planned, checkpoint))  # raises BaseMismatch
    untied = set() if task_set.is_base else shared_weights(planned).keys() & set(checkpoint.manifest.modules)
    if untied:
        _untie_config(planned)
    _save_config(planned.config, out, file)
    if untied:
        _require_untied(build_without_weights(out), untied, file)

    model = _load(base_folder)
    if dtype is not None:
        _cast(model, torch.promote_types(dtype, model.dtype))
    Merger(model, checkpoint, keep_projections=False).merge(task_set)
    if dtype is not None:
        _cast(model, dtype)
    if untied:
        _copy_shared(model)
        _untie_config(model)
    _save(model, base_folder, out)
    tokenizer.save_pretrained(out)


def _save_config(config: PretrainedConfig, out: Path, file: Path) -> None:
    try:
        config.save_pretrained(out)
    except ValueError as error:  # transformers checks more when it writes than when it reads
        message = f"transformers does not write this config ({one_line(error)})"
        raise ConfigError(Problem(message, file=str(file), remedy="correct it in a copy of the model")) from error


def _require_untied(model: PreTrainedModel, untied: Collection[str], file: Path) -> None:
    """Raises ConfigError if the written config still makes modules share their weight."""
    tied = sorted(shared_weights(model).keys() & set(untied))
    if tied:
        message = f"{type(model).__name__} always shares the weight of {tied[0]}, so a merged model cannot be stored"
        raise ConfigError(Problem(message, "--format", str(file), "export --format peft"))


def _load(folder: Path) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `loading_problems` reports them
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # transformers and safetensors have no exception in common
        message = f"the weights cannot be loaded ({one_line(error)})"
        remedy = "complete the download of the model, or name another (--model)"
        raise ConfigError(Problem(message, file=str(folder), remedy=remedy)) from error
    model: PreTrainedModel = loaded[0]
    problems = base_files.loading_problems(folder, model, loaded[1])
    if problems:
        raise ConfigError(problems)
    return model


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts every number of the model, but for those that transformers keeps in float32."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)


def _copy_shared(model: PreTrainedModel) -> None:
    """Gives every parameter that the config ties to another one a memory of its own, so that each is written."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        parameter = model.get_parameter_or_buffer(target)
        if parameter is model.get_parameter_or_buffer(source):
            module, _, name = target.rpartition(".")
            setattr(model.get_submodule(module), name, torch.nn.Parameter(parameter.detach().clone(), False))


def _untie_config(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False


def _save(model: PreTrainedModel, base_folder: Path, out: Path) -> None:
    generation = base_folder / _GENERATION
    if generation.is_file():  # transformers refuses to write some that it reads
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # of transformers
    try:
        model.save_pretrained(out)
        if generation.is_file():
            shutil.copyfile(generation, out / _GENERATION)
    except (OSError, SafetensorError) as error:
        message = f"the model cannot be written ({one_line(error)})"
        raise ConfigError(Problem(message, "--out", str(out), "make room, or name another folder")) from error
