"""Checks a base model before its weights are loaded: config, tokenizer, and the weights against the config.

transformers builds the model on torch's `meta` device and "loads" tensors into it that have the weights' shapes only,
by the same code that loads the weights later. No code that a model brings along is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = "attn_implementation"
_UNSUPPORTED = "use a causal language model that this version of transformers supports"


@dataclass(frozen=True)
class BaseModelShape:
    """What a model's config alone says about it.

    Attributes:
        folder: of its files.
        modules: target module → (d_out, d_in).
        parameters: number in the whole model, tied weights counted once.
        context: longest sequence that its config speaks of, in tokens; None: it speaks of none.
        positions: longest sequence that it can read at all, in tokens; None: there is no limit.
        vocabulary: rows of its embedding.
        model_type: transformers' name for the architecture.
        experts: number of weights in fused experts, which no adapter changes.
    """

    folder: Path
    modules: dict[str, tuple[int, int]]
    parameters: int
    context: int | None
    positions: int | None
    vocabulary: int
    model_type: str
    experts: int


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in a model's folder.

    Raises:
        ConfigError: its files are missing or damaged, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        encoded = tokenizer("a b")["input_ids"]
    except Exception as error:  # transformers and tokenizers have no exception in common
        own_code = _own_code(folder / "tokenizer_config.json")
        if own_code is not None:
            raise ConfigError(own_code) from error
        message = f"the tokenizer cannot be loaded ({one_line(error)})"
        remedy = "add the model's own tokenizer.json and tokenizer_config.json to the folder"
        raise ConfigError(Problem(message, file=str(folder), remedy=remedy)) from error
    if not encoded or not len(tokenizer):
        message = "the tokenizer knows no text: transformers found no vocabulary for it"
        remedy = "add the model's own tokenizer.json to the folder"
        raise ConfigError(Problem(message, file=str(folder), remedy=remedy))
    return tokenizer


def base_model_shape(
    folder: Path, target_modules: Sequence[str], file: str = "", attention: str | None = None
) -> BaseModelShape:
    """Builds the model without weights, compares it with the headers of the weights, and finds its target modules.

    Args:
        target_modules: last parts of module names.
        file: the configuration's path, for messages.
        attention: `attn_implementation` of the file.

    Raises:
        ConfigError: transformers does not support the model, its files are not whole or do not belong together, it
            lacks a target module, or model or machine lack the implementation of attention.
    """
    from loraf import base_files
    from loraf_train.adapter import model_limits
    from loraf_train.adapter.trainable_base import find_targets, fused_experts, shapes_of

    problems = base_files.problems(folder)
    model, targets = None, {}
    try:
        model = build_without_weights(folder)
        targets = find_targets(model, target_modules, file)
    except ConfigError as error:
        problems += error.problems
    if model is not None and attention is not None:
        unsupported = attention_problem(folder, attention, file)
        problems += [unsupported] if unsupported is not None else []
    if model is not None and not problems:
        problems += _weight_problems(folder, model)
    if problems or model is None:
        raise ConfigError(problems)
    return BaseModelShape(
        folder=folder,
        modules=shapes_of(targets),
        parameters=sum(p.numel() for p in model.parameters()),
        context=model_limits.context(model),
        positions=model_limits.positions(model),
        vocabulary=model_limits.vocabulary(model),
        model_type=model.config.model_type,
        experts=fused_experts(model),
    )


def build_without_weights(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """Builds the model that a folder's config.json describes, on the `meta` device.

    Args:
        attention: transformers' name of an implementation; None: what it chooses.

    Raises:
        ConfigError: transformers has no such causal language model, or it would need code of the model's own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    file = folder / "config.json"
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.is_encoder_decoder:
            message = f"{config.model_type} has an encoder, and a causal language model has none"
            raise ConfigError(Problem(message, "is_encoder_decoder", str(file), _UNSUPPORTED))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # of transformers
                config, trust_remote_code=False, **attention_keywords(attention)
            )
    except ConfigError:
        raise
    except Exception as error:  # configs and models raise many kinds where values are missing or contradict each other
        known = _own_code(file) or _padding_beyond(file)
        if known is not None:
            raise ConfigError(known) from error
        message = f"transformers cannot build the model ({one_line(error)})"
        raise ConfigError(Problem(message, file=str(file), remedy=f"correct it, or {_UNSUPPORTED}")) from error
    return model


def attention_keywords(attention: str | None) -> dict[str, Any]:
    """What transformers is given for an implementation of attention; None would be one, too: its own default."""
    return {} if attention is None else {ATTENTION: attention}


def attention_problem(folder: Path, name: str, file: str = "") -> Problem | None:
    """Returns why the model cannot compute attention in this way, or this machine cannot; None: they can.

    Args:
        folder: of the model.
        file: the configuration's path.
    """
    import torch

    remedy = "choose another, or leave it out for what transformers chooses"
    if name.startswith("flash_attention") and not torch.cuda.is_available():
        return Problem(f"{name} runs on GPUs, and torch sees none on this machine", ATTENTION, file, remedy)
    if name == "flex_attention" and not torch.cuda.is_available():
        return Problem(f"{name} trains on GPUs only, and torch sees none on this machine", ATTENTION, file, remedy)
    try:
        used = build_without_weights(folder, name).config._attn_implementation
    except ConfigError as error:
        return Problem(f"{error.problems[0].message}, with {name}", ATTENTION, file, remedy)
    if used != name and "flash" not in name:  # a flash kernel may come from elsewhere, under another name
        return Problem(f"the model would compute attention with {used}, not with {name}", ATTENTION, file, remedy)
    return None


def _own_code(file: Path) -> Problem | None:
    """The problem with a config that names code of the model's own, None if it names none."""
    named = _read(file).get("auto_map")
    if not named:
        return None
    code = ", ".join(sorted(named)) if isinstance(named, dict) else str(named)
    message = f"needs code that the model brings along ({code}), which is never run"
    return Problem(message, "auto_map", str(file), "use a model that transformers supports by itself")


def _padding_beyond(file: Path) -> Problem | None:
    """The problem with a padding token that is not in the vocabulary: the embeddings of most models refuse it."""
    config = _read(file)
    text = config | config["text_config"] if isinstance(config.get("text_config"), dict) else config
    padding, rows = text.get("pad_token_id"), text.get("vocab_size")
    if not isinstance(padding, int) or not isinstance(rows, int) or padding < rows:
        return None
    message = f"{padding} is beyond the vocabulary of {rows} tokens"
    return Problem(message, "pad_token_id", str(file), "set it to null or to a token's id")


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file holds none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _weight_problems(folder: Path, model: PreTrainedModel) -> list[Problem]:
    from loraf import base_files

    try:
        loaded: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=base_files.without_values(folder),
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # where several weights are converted into one, their shapes may not fit together
        message = f"transformers cannot fit the weights into the model of config.json ({one_line(error)})"
        return [Problem(message, file=str(folder), remedy="use the config.json that belongs to the weights")]
    return base_files.loading_problems(folder, loaded[0], loaded[1])
