"""From the user's vLLM options to the arguments of an engine for the slots backend."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import psutil
import pydantic
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from loraf.errors import ConfigError, Problem

DEFAULT_SLOTS = 4
EXTENSION = "loraf_serve.vllm.extension.WorkerExtension"
_WHERE = "vLLM's options"
_REMEDY = "see vLLM's documentation of its engine arguments"
_GIB = 1 << 30

# Options that the backend sets itself, and why a user cannot.
_OURS = {
    "model": "the model is named by loraf-serve's own --model",
    "enable_lora": "the slots backend always enables LoRA",
    "worker_extension_cls": "the slots backend brings its own worker extension",
    "default_mm_loras": "adapters are named by --adapter",
}
# Ways to spread a model that the slots backend is not made for.
_ONE_ONLY = ("pipeline_parallel_size", "data_parallel_size")


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(message, _WHERE, remedy=_REMEDY))


def engine_args(model_folder: Path, options: Sequence[str], max_rank: int) -> AsyncEngineArgs:
    """The engine's arguments: the user's options, and what the slots backend needs.

    Args:
        options: vLLM's own command-line options, as typed.
        max_rank: the largest rank among the adapters known at start.

    Raises:
        ConfigError: vLLM does not know an option or refuses its value, or options contradict what the backend needs
            (all of these at once).
    """
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False, allow_abbrev=False))
    # None for «not given», so that the user's word can be told from a default.
    decided = (*_OURS, *_ONE_ONLY, "max_loras", "max_cpu_loras", "max_lora_rank", "gpu_memory_utilization")
    parser.set_defaults(**dict.fromkeys(decided))
    try:
        args = parser.parse_args(list(options))
        given = {name: value for name in decided if (value := vars(args).pop(name)) is not None}
        rank = lora_rank(max_rank)
        _refuse_contradictions(given, rank)
        slots = given.get("max_loras", DEFAULT_SLOTS)
        ours = {
            "model": str(model_folder),
            "enable_lora": True,
            "worker_extension_cls": EXTENSION,
            "max_lora_rank": rank,
            "max_loras": slots,
            "max_cpu_loras": 2 * slots,  # sets that lost their slot and need not be built again
            "use_tqdm_on_load": False,
            # Its metrics would get a label for every task set that a request has named.
            "disable_log_stats": True,
        }
        made = AsyncEngineArgs.from_cli_args(argparse.Namespace(**vars(args) | ours | given))
    except (ValueError, TypeError) as error:
        raise refused(error) from None
    by_environment = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if current_platform.is_cpu() and not by_environment and "gpu_memory_utilization" not in given:
        made.kv_cache_memory_bytes = made.kv_cache_memory_bytes or _kv_cache_bytes()
    return made


def refused(error: Exception) -> ConfigError:
    """What vLLM says against its options or the model, without pydantic's wrapping."""
    problems = []
    if isinstance(error, pydantic.ValidationError):
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            field = ".".join(str(part) for part in detail["loc"]) or _WHERE
            problems.append(Problem(detail["msg"].removeprefix("Value error, "), field, remedy=_REMEDY))
    return ConfigError(problems or Problem(str(error), _WHERE, remedy=_REMEDY))


def lora_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds adapters of `rank`.

    Raises:
        ConfigError: there is none.
    """
    supported = sorted(get_args(MaxLoRARanks))
    for candidate in supported:
        if candidate >= rank:
            return candidate
    message = f"rank {rank} is beyond vLLM's largest, {supported[-1]}"
    raise ConfigError(Problem(message, "adapter.rank", remedy="serve it with --backend merged"))


def _refuse_contradictions(given: dict, rank: int) -> None:
    """Args: options that the user gave, by their names in EngineArgs; the rank that the adapters need."""

    def option(name: str) -> str:
        return "--" + name.replace("_", "-")

    problems = [Problem(why, option(name), remedy="leave it out") for name, why in _OURS.items() if name in given]
    for name in _ONE_ONLY:
        if given.get(name, 1) != 1:
            remedy = "use --tensor-parallel-size, or several servers"
            problems.append(Problem("the slots backend cannot split a model this way", option(name), remedy=remedy))
    if given.get("max_lora_rank", rank) < rank:
        message = f"{given['max_lora_rank']} is too small for the adapters to be served"
        problems.append(Problem(message, "--max-lora-rank", remedy=f"leave it out, or say {rank}"))
    if problems:
        raise ConfigError(problems)


def _kv_cache_bytes() -> int:
    """Where the user said nothing: an eighth of the memory that is free, from 1 to 4 GiB.

    vLLM's own default on the CPU is a fixed share of all memory, and it fails where that is not free.
    """
    return min(4 * _GIB, max(_GIB, psutil.virtual_memory().available // 8))
