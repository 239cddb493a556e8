"""Which workers a stock `vllm serve` uses: a LoRA slot for each task set, or, if it is asked to and can, resident ones.

LORAF_STOCK_BACKEND=resident     any number of task sets in one batch, whatever --max-loras says
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from loraf.errors import ConfigError, Problem
from loraf_serve.vllm.naming import RESIDENT_EXTENSION, STOCK_EXTENSION, UNSUPPORTED_SPLITS, option

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

BACKEND = "LORAF_STOCK_BACKEND"  # environment variable
RESIDENT = "resident"
_CHOICES = ("slots", RESIDENT)
_LEAST_RANK = 64  # that a GPU has room for


def is_resident_asked() -> bool:
    """Whether the user asks for resident workers. Raises ConfigError: the variable has another value."""
    value = os.environ.get(BACKEND) or _CHOICES[0]
    if value not in _CHOICES:
        remedy = f"set it to {' or '.join(_CHOICES)}, or leave it out"
        raise ConfigError(Problem(f"{value!r} is not a backend", BACKEND, remedy=remedy))
    return value == RESIDENT


def obstacle_in(engine_args: EngineArgs) -> str | None:
    """Returns why resident workers cannot serve with these arguments, as far as that is known before vLLM has completed
    them; or None."""
    if engine_args.worker_extension_cls not in ("", None, STOCK_EXTENSION, RESIDENT_EXTENSION):
        return f"{option('worker_extension_cls')} names another worker extension"
    for name in UNSUPPORTED_SPLITS:
        if getattr(engine_args, name) != 1:
            return f"it does not support a model that is split by {option(name)}"
    if engine_args.fully_sharded_loras:
        return f"it does not shard A by rank ({option('fully_sharded_loras')})"
    return None


def obstacle_of(config: VllmConfig) -> str | None:
    """Returns why resident workers cannot serve with this configuration, or None."""
    from loraf_serve.vllm.resident import support

    lora, model = config.lora_config, config.model_config
    assert lora is not None
    if lora.lora_dtype is not model.dtype:
        return f"{option('lora_dtype')} {lora.lora_dtype} differs from the model's {model.dtype}"
    return support.obstacle(model.architectures)


def without_slots(config: VllmConfig) -> None:
    """Adapts a configuration to resident workers."""
    lora = config.lora_config
    assert lora is not None
    # One set for every sequence of a batch, so that the scheduler never makes a set wait for another.
    lora.max_loras = lora.max_cpu_loras = config.scheduler_config.max_num_seqs
    # Fixes the size of the GPU kernel's memory. Need not be one of vLLM's ranks.
    lora.max_lora_rank = cast(Any, max(lora.max_lora_rank, _LEAST_RANK))
