"""Loads the base model of a run: frozen, complete, in the precision and the form that the file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from loraf import base_files, base_model
from loraf.errors import ConfigError, Problem, one_line
from loraf_train.adapter import quantised, sharding
from loraf_train.processes import group, launcher
from loraf_train.sequence.base_checks import attention_keywords, attention_problem, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf_train.settings.config import RunConfig

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase", Path]


def load_model(config: RunConfig) -> Loaded:
    """Loads the base model, frozen, on the GPU if there is one.

    `precision: auto` is float32 on a CPU, and bfloat16 on a GPU that supports it. If the launcher requests FSDP, this
    joins the processes and shards the model over them.

    Returns:
        The model, its tokenizer, and the folder of both.

    Raises:
        ConfigError: the model could not be loaded or downloaded, its files are not a complete causal language model, or
            the launcher requests something unsupported.
    """
    refused = launcher.problems()
    if refused:
        raise ConfigError(refused)
    file = str(config.file)
    folder = base_model.resolve(config.model, config.revision, file)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    precision = config.precision
    use_bfloat16 = precision == "bfloat16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    dtype = torch.bfloat16 if use_bfloat16 else torch.float32
    base_files.require_loadable(folder)
    unsupported = attention_problem(folder, config.attn_implementation, file) if config.attn_implementation else None
    if unsupported is None and config.quantization is not None:
        unsupported = quantised.machine_problem(file, device)
    if unsupported is not None:
        raise ConfigError(unsupported)
    tokenizer = load_tokenizer(folder)
    # Written a second time in loraf_serve.backends.merged: neither package imports the other, and `loraf` must not
    # import transformers.
    try:
        with _no_progress_bars():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                **attention_keywords(config.attn_implementation),
                **({} if config.quantization is None else _quantised(device, dtype)),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `loading_problems` reports them
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:  # transformers, tokenizers and safetensors have no exception in common
        message = f"the model in {folder} cannot be loaded ({one_line(error)})"
        remedy = "use a causal language model that this version of transformers supports, with safetensors weights"
        raise ConfigError(Problem(message, "model", file, remedy)) from error
    model: PreTrainedModel = loaded[0]
    problems = base_files.loading_problems(folder, model, loaded[1], quantised=config.quantization is not None)
    if problems:
        raise ConfigError(problems)
    model.train(False).requires_grad_(False)
    sharded = launcher.sharding()
    if sharded is None and config.quantization is not None:
        quantised.settle(model)
        return model, tokenizer, folder  # it was loaded to the device
    if sharded is None:
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides torch's signature
        return model, tokenizer, folder
    group.join(device)  # not before: transformers would load the weights in the first process only
    sharding.shard(model, device, sharded)
    return model, tokenizer, folder


def _quantised(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given to quantise the base while it is loaded."""
    return {"quantization_config": quantised.four_bit(dtype), "device_map": {"": device}}


class _no_progress_bars:
    """Switches off transformers' progress bars, a setting of the whole process, for a `with` block."""

    def __enter__(self) -> None:
        self._enabled = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers

    def __exit__(self, *exc: object) -> None:
        if self._enabled:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
