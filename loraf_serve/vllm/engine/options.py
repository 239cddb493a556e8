"""From the user's vLLM options to the arguments of an engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import psutil
import pydantic
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from loraf.errors import ConfigError, Problem
from loraf_serve.vllm.naming import RESIDENT_EXTENSION, SLOTS_EXTENSION

DEFAULT_SLOTS = 4
_WHERE = "vLLM's options"
_REMEDY = "see vLLM's documentation of its engine arguments"
_GIB = 1 << 30
_LEAST_SHARE = 0.1  # of a GPU's memory, for a model and its KV cache

# Options that a backend sets itself, and why a user cannot.
_OURS = {
    "model": "the model is named by loraf-serve's own --model",
    "enable_lora": "LoRA is always enabled",
    "worker_extension_cls": "the backend brings its own worker extension",
    "default_mm_loras": "adapters are named by --adapter",
}
_SLOTS = {"max_loras": "slots", "max_cpu_loras": "slots", "max_lora_rank": "slots of one rank"}
# Ways to spread a model that the backends are not made for.
_ONE_ONLY = ("pipeline_parallel_size", "data_parallel_size")


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(message, _WHERE, remedy=_REMEDY))


def slots_args(model_folder: Path, options: Sequence[str], max_rank: int, reserve: int = 0) -> AsyncEngineArgs:
    """The arguments of an engine for the slots backend.

    Args:
        max_rank: the largest rank among the adapters known at start.

    Raises:
        ConfigError: see `_engine_args`; or the rank is beyond vLLM's, or beyond the user's --max-lora-rank.
    """

    def needed(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        rank = lora_rank(max_rank)
        slots = given.get("max_loras", DEFAULT_SLOTS)
        problems = []
        if given.get("max_lora_rank", rank) < rank:
            message = f"{given['max_lora_rank']} is too small for the adapters to be served"
            problems.append(Problem(message, "--max-lora-rank", remedy=f"leave it out, or say {rank}"))
        # Twice as many sets as slots stay built: a set that lost its slot need not be built again.
        ours = {"worker_extension_cls": SLOTS_EXTENSION, "max_loras": slots, "max_cpu_loras": 2 * slots}
        return ours | {"max_lora_rank": rank}, problems

    # Checkpoints stay in main memory; what a GPU holds of them are the slots, which vLLM counts.
    return _engine_args(model_folder, options, reserve if current_platform.is_cpu() else 0, needed)


def resident_args(model_folder: Path, options: Sequence[str], reserve: int = 0) -> AsyncEngineArgs:
    """The arguments of an engine for the resident backend.

    Raises:
        ConfigError: see `_engine_args`; or an option speaks of slots, of which there are none.
    """

    def needed(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        remedy = "leave it out, or serve with --backend slots"
        problems = [
            Problem(f"the resident backend has no {what}", _option(name), remedy=remedy)
            for name, what in _SLOTS.items()
            if name in given
        ]
        if given.get("fully_sharded_loras"):
            message = "the resident backend has no A to shard by rank"
            problems.append(Problem(message, "--fully-sharded-loras", remedy="leave it out"))
        return {"worker_extension_cls": RESIDENT_EXTENSION}, problems

    return _engine_args(model_folder, options, reserve, needed)


def _engine_args(
    model_folder: Path,
    options: Sequence[str],
    reserve: int,
    needed: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[Problem]]],
) -> AsyncEngineArgs:
    """The user's options, and what a backend needs.

    Args:
        options: vLLM's own command-line options, as typed.
        reserve: bytes to leave free for adapters (on every GPU) where the user gave no size of the KV cache.
        needed: given the options that the user gave among those that backends decide (by their names in EngineArgs),
            what the backend sets where the user said nothing, and what speaks against the user's choice.

    Raises:
        ConfigError: vLLM does not know an option or refuses its value, or options contradict what the backend needs
            (all of these at once).
    """
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False, allow_abbrev=False))
    # None for «not given», so that the user's word can be told from a default.
    decided = (*_OURS, *_ONE_ONLY, *_SLOTS, "fully_sharded_loras", "gpu_memory_utilization")
    parser.set_defaults(**dict.fromkeys(decided))
    try:
        args = parser.parse_args(list(options))
        given = {name: value for name in decided if (value := vars(args).pop(name)) is not None}
        ours, problems = needed(given)
        problems = _contradictions(given) + problems
        if problems:
            raise ConfigError(problems)
        common = {
            "model": str(model_folder),
            "enable_lora": True,
            "use_tqdm_on_load": False,
            # Its metrics would get a label for every task set that a request has named.
            "disable_log_stats": True,
        }
        made = AsyncEngineArgs.from_cli_args(argparse.Namespace(**vars(args) | common | ours | given))
    except (ValueError, TypeError) as error:
        raise refused(error) from None
    if "gpu_memory_utilization" in given or made.kv_cache_memory_bytes:
        return made
    if current_platform.is_cpu():
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            made.kv_cache_memory_bytes = _kv_cache_bytes(reserve)
    elif reserve:
        share = made.gpu_memory_utilization
        made.gpu_memory_utilization = _without(reserve, share, current_platform.get_device_total_memory())
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
    raise ConfigError(Problem(message, "adapter.rank", remedy="serve it with --backend resident or merged"))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _contradictions(given: Mapping[str, Any]) -> list[Problem]:
    """Args: options that the user gave, by their names in EngineArgs."""
    problems = [Problem(why, _option(name), remedy="leave it out") for name, why in _OURS.items() if name in given]
    for name in _ONE_ONLY:
        if given.get(name, 1) != 1:
            remedy = "use --tensor-parallel-size, or several servers"
            problems.append(Problem("loraf-serve cannot split a model this way", _option(name), remedy=remedy))
    return problems


def _kv_cache_bytes(reserve: int) -> int:
    """Where the user said nothing: an eighth of the memory that is free and not reserved, from 1 to 4 GiB.

    vLLM's own default on the CPU is a fixed share of all memory, and it fails where that is not free.
    """
    return min(4 * _GIB, max(_GIB, (psutil.virtual_memory().available - reserve) // 8))


def _without(reserve: int, share: float, total: int) -> float:
    """The share of a GPU's `total` bytes that vLLM may use, if `reserve` of them are to stay free besides.

    Raises:
        ConfigError: that leaves vLLM next to nothing.
    """
    left = share - reserve / total
    if left < _LEAST_SHARE:
        message = f"{reserve:,} bytes for adapters leave vLLM {max(left, 0):.0%} of a GPU of {total:,}"
        raise ConfigError(Problem(message, "--adapter-memory", remedy="give less, or say --gpu-memory-utilization"))
    return left
