"""Turns the user's vLLM options into the arguments of an engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import psutil
import pydantic
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from loraf.base_model import require_no_adapter
from loraf.errors import ConfigError, Problem
from loraf.hub import public_name
from loraf_serve.vllm.naming import RESIDENT_EXTENSION, SLOTS_EXTENSION, UNSUPPORTED_SPLITS, option

DEFAULT_SLOTS = 4
_FIELD = "vLLM's options"
_REMEDY = "see vLLM's documentation of its engine arguments"
_GIB = 1 << 30
_MIN_GPU_SHARE = 0.1  # of a GPU's memory, for the model and its KV cache

# Options that a user cannot set, and why.
_FIXED = {
    "model": "the model is set with loraf-serve's own --model",
    "revision": "the model's revision is set with loraf-serve's own --revision",
    "enable_lora": "LoRA is always enabled",
    "worker_extension_cls": "the backend brings its own worker extension",
    "default_mm_loras": "adapters are set with --adapter",
}
_SLOTS = {"max_loras": "slots", "max_cpu_loras": "slots", "max_lora_rank": "slots with a maximum rank"}

# The values with which an engine generates text, and why no other is accepted.
_NEEDED = {
    "skip_tokenizer_init": ((False,), "the tokenizer is needed: it makes prompts of text, and text of answers"),
    "runner": (("auto", "generate"), "loraf-serve generates text"),
    "convert": (("auto", "none"), "loraf-serve generates text"),
}

UserOptions = Mapping[str, Any]  # the options of `_CHECKED_OPTIONS` that the user set, by their names in EngineArgs
_CHECKED_OPTIONS = (
    *(*_FIXED, *_NEEDED, *UNSUPPORTED_SPLITS, *_SLOTS),
    *("fully_sharded_loras", "gpu_memory_utilization", "scheduling_policy", "structured_outputs_config"),
    *("tokenizer", "tokenizer_revision"),
)


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(message, _FIELD, remedy=_REMEDY))


def slots_args(model_folder: Path, options: Sequence[str], max_rank: int, reserve: int = 0) -> AsyncEngineArgs:
    """Returns the arguments of an engine for the slots backend.

    Args:
        max_rank: the largest rank among the adapters known at start.
        reserve: bytes to leave free for adapters if the user set no size of the KV cache.

    Raises:
        ConfigError: see `_engine_args`. Also if the rank exceeds vLLM's limit or the user's --max-lora-rank.
    """

    def settings(user: UserOptions) -> tuple[dict[str, Any], list[Problem]]:
        rank = lora_rank(max_rank)
        slots = user.get("max_loras", DEFAULT_SLOTS)
        problems = []
        if user.get("max_lora_rank", rank) < rank:
            message = f"{user['max_lora_rank']} is too small for the adapters to be served"
            problems.append(Problem(message, "--max-lora-rank", remedy=f"leave it out, or set it to {rank}"))
        # Twice as many sets as slots stay built, so that a set need not be rebuilt when it gets a slot again.
        defaults = {"worker_extension_cls": SLOTS_EXTENSION, "max_loras": slots, "max_cpu_loras": 2 * slots}
        return defaults | {"max_lora_rank": rank}, problems

    # Checkpoints stay in main memory. A GPU only holds the slots, which vLLM accounts for.
    return _engine_args(model_folder, options, reserve if current_platform.is_cpu() else 0, settings)


def resident_args(model_folder: Path, options: Sequence[str], reserve: int = 0) -> AsyncEngineArgs:
    """Returns the arguments of an engine for the resident backend.

    Args:
        reserve: bytes to leave free for adapters, on every GPU, if the user set no size of the KV cache.

    Raises:
        ConfigError: see `_engine_args`. Also if an option configures slots, which this backend does not have.
    """

    def settings(user: UserOptions) -> tuple[dict[str, Any], list[Problem]]:
        remedy = "leave it out, or serve with --backend slots"
        problems = [
            Problem(f"the resident backend has no {feature}", option(name), remedy=remedy)
            for name, feature in _SLOTS.items()
            if name in user
        ]
        if user.get("fully_sharded_loras"):
            message = "the resident backend does not shard A by rank"
            problems.append(Problem(message, "--fully-sharded-loras", remedy="leave it out"))
        return {"worker_extension_cls": RESIDENT_EXTENSION}, problems

    return _engine_args(model_folder, options, reserve, settings)


def _engine_args(
    model_folder: Path,
    options: Sequence[str],
    reserve: int,
    settings: Callable[[UserOptions], tuple[dict[str, Any], list[Problem]]],
) -> AsyncEngineArgs:
    """Combines the user's options with a backend's settings.

    Args:
        options: vLLM's own command-line options, as typed.
        reserve: bytes to leave free for adapters, on every GPU, if the user set no size of the KV cache.
        settings: returns the backend's settings, which the user's options override, and the problems with the latter.

    Raises:
        ConfigError: vLLM does not know an option or refuses its value, or options contradict the backend's settings
            (lists all contradictions), or an adapter lies in the model's folder.
    """
    require_no_adapter(model_folder)
    base = _Parser(add_help=False, allow_abbrev=False)  # type: ignore[no-untyped-call]  # vLLM leaves it unannotated
    parser = AsyncEngineArgs.add_cli_args(base)
    # None marks an option that the user did not set.
    parser.set_defaults(**dict.fromkeys(_CHECKED_OPTIONS))
    try:
        parsed = vars(parser.parse_args(list(options)))
        user = {name: value for name in _CHECKED_OPTIONS if (value := parsed.pop(name)) is not None}
        backend_settings, problems = settings(user)
        problems = _contradictions(user) + problems
        if problems:
            raise ConfigError(problems)
        common = {
            "model": str(model_folder),
            "enable_lora": True,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,  # neither log lines nor metrics, unless a backend asks for the latter
            # Requests have a priority. While all have the same, the first comes first, as with vLLM's default.
            "scheduling_policy": "priority",
            # A model that was not trained on JSON may fill an answer with white space.
            "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            # A label of vLLM's metrics, in place of the model's path on this machine.
            "served_model_name": parsed.get("served_model_name") or [public_name(model_folder)],
        }
        namespace = argparse.Namespace(**parsed | common | backend_settings | user)
        args: AsyncEngineArgs = AsyncEngineArgs.from_cli_args(namespace)
    except (ValueError, TypeError) as error:
        raise option_error(error) from None
    if "gpu_memory_utilization" in user or args.kv_cache_memory_bytes:
        return args
    if current_platform.is_cpu():
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            args.kv_cache_memory_bytes = _kv_cache_bytes(reserve)
    elif reserve:
        share = args.gpu_memory_utilization
        args.gpu_memory_utilization = _share_without(reserve, share, current_platform.get_device_total_memory())
    return args


def engine_config(args: AsyncEngineArgs) -> VllmConfig:
    """Returns the engine's configuration, as vLLM completes it from the arguments and the model's config.

    Raises:
        ConfigError: vLLM refuses an option or the model.
    """
    try:
        return args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    # vLLM raises these for a user's options or model, with an explanation. Others are bugs and propagate.
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise option_error(error) from None


def option_error(error: Exception) -> ConfigError:
    """Converts vLLM's error about its options or the model, without pydantic's wrapping."""
    problems = []
    if isinstance(error, pydantic.ValidationError):
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            field = ".".join(str(part) for part in detail["loc"]) or _FIELD
            problems.append(Problem(detail["msg"].removeprefix("Value error, "), field, remedy=_REMEDY))
    return ConfigError(problems or Problem(str(error), _FIELD, remedy=_REMEDY))


def require_xgrammar(config: VllmConfig) -> None:
    """Has every form of an answer kept by XGrammar, for which `loraf_serve.vllm.forms` checks it.

    By default vLLM's engine would use for all forms what it chose for the first one.

    Raises:
        ConfigError: the user chose another.
    """
    outputs = config.structured_outputs_config
    if outputs.backend not in ("auto", "xgrammar"):
        message = f"{outputs.backend} is not supported: loraf-serve checks forms of answers for XGrammar"
        raise ConfigError(Problem(message, "--structured-outputs-config.backend", remedy="leave it out"))
    outputs.backend = "xgrammar"


def lora_rank(rank: int) -> int:
    """Returns the smallest of vLLM's ranks that is at least `rank`.

    Raises:
        ConfigError: there is none.
    """
    supported: list[int] = sorted(get_args(MaxLoRARanks))
    for candidate in supported:
        if candidate >= rank:
            return candidate
    message = f"rank {rank} is beyond vLLM's largest, {supported[-1]}"
    raise ConfigError(Problem(message, "adapter.rank", remedy="serve it with --backend resident or merged"))


def _contradictions(user: UserOptions) -> list[Problem]:
    """Returns the user's options that no backend accepts."""
    problems = [Problem(reason, option(name), remedy="leave it out") for name, reason in _FIXED.items() if name in user]
    if "tokenizer_revision" in user and "tokenizer" not in user:  # vLLM ignores it: the model is a local folder here
        message, remedy = "the tokenizer has the model's revision", "leave it out, or set loraf-serve's --revision"
        problems.append(Problem(message, option("tokenizer_revision"), remedy=remedy))
    for name, (values, reason) in _NEEDED.items():
        if user.get(name, values[0]) not in values:
            problems.append(Problem(reason, option(name), remedy="leave it out"))
    for name in UNSUPPORTED_SPLITS:
        if user.get(name, 1) != 1:
            remedy = "use --tensor-parallel-size, or several servers"
            problems.append(Problem("loraf-serve cannot split a model this way", option(name), remedy=remedy))
    return problems


def _kv_cache_bytes(reserve: int) -> int:
    """Returns the default size of the KV cache on the CPU: an eighth of the free memory beyond `reserve`, 1 to 4 GiB.

    vLLM's own default is a fixed share of all memory, and vLLM fails to start if that is not free.
    """
    return min(4 * _GIB, max(_GIB, (psutil.virtual_memory().available - reserve) // 8))


def _share_without(reserve: int, share: float, total: int) -> float:
    """Returns the share of a GPU's `total` bytes that vLLM may use if `reserve` bytes of its `share` stay free.

    Raises:
        ConfigError: too little would be left for vLLM.
    """
    left = share - reserve / total
    if left < _MIN_GPU_SHARE:
        message = f"{reserve:,} bytes for adapters leave vLLM {max(left, 0):.0%} of a GPU with {total:,} bytes"
        raise ConfigError(Problem(message, "--adapter-memory", remedy="reduce it, or set --gpu-memory-utilization"))
    return left
