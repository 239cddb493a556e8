"""What vLLM would reserve for an engine, from its own configuration. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from loraf_serve.vllm.engine.arguments import engine_config, resident_args, slots_args
from loraf_serve.vllm.engine.environment import engine_environment


@dataclass(frozen=True)
class EnginePlan:
    """An engine as vLLM has configured it.

    Attributes:
        on_gpu: the weights, the KV cache and what adapters need in a step are on GPUs.
        workers: among which vLLM divides the model.
        kv_cache_bytes: of each worker, where it is set; None: vLLM measures at start what its share leaves.
        share: of each worker's memory, for weights and KV cache together.
        memory: bytes of each worker's device.
        kv_bytes_per_token: of each worker; at most, if not every layer keeps every token.
        block: tokens in a block of the KV cache.
        keeps_every_token: all layers keep keys and values of all tokens.
        slots: LoRA slots in each worker, 0 if there are none; `slot_rank` is the rank they have room for.
        built_sets: task sets that stay built in main memory.
    """

    on_gpu: bool
    workers: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    max_model_len: int
    kv_cache_bytes: int | None
    share: float
    memory: int
    kv_bytes_per_token: int
    block: int
    keeps_every_token: bool
    slots: int = 0
    slot_rank: int = 0
    built_sets: int = 0


def plan(
    backend: str, model_folder: Path, engine_options: Sequence[str], max_rank: int, adapter_memory: int | None
) -> EnginePlan:
    """Returns what the backend `slots` or `resident` would reserve. Arguments as `VllmBackend`.

    Raises:
        ConfigError: vLLM's options contradict each other or the model.
    """
    with engine_environment():
        folder, reserve = Path(model_folder).resolve(), adapter_memory or 0
        if backend == "slots":
            args = slots_args(folder, engine_options, max_rank, reserve)
        else:
            args = resident_args(folder, engine_options, reserve)
        config = engine_config(args)
    model, lora = config.model_config, config.lora_config
    assert lora is not None and isinstance(model.dtype, torch.dtype) and isinstance(lora.lora_dtype, torch.dtype)
    has_slots = backend == "slots"
    return EnginePlan(
        on_gpu=not current_platform.is_cpu(),
        workers=config.parallel_config.tensor_parallel_size,
        dtype=model.dtype,
        lora_dtype=lora.lora_dtype,
        max_model_len=model.max_model_len,
        kv_cache_bytes=config.cache_config.kv_cache_memory_bytes,
        share=config.cache_config.gpu_memory_utilization,
        memory=current_platform.get_device_total_memory(),
        kv_bytes_per_token=_kv_bytes_per_token(config),
        block=config.cache_config.block_size,
        keeps_every_token=not (model.is_hybrid or model.use_mla or model.get_sliding_window()),
        slots=lora.max_loras if has_slots else 0,
        slot_rank=lora.max_lora_rank if has_slots else 0,
        built_sets=lora.max_cpu_loras or 0 if has_slots else 0,
    )


def _kv_bytes_per_token(config: VllmConfig) -> int:
    model, parallel = config.model_config, config.parallel_config
    assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved names by now
    size = 1 if config.cache_config.cache_dtype.startswith("fp8") else model.dtype.itemsize
    kinds = 1 if model.use_mla else 2  # keys and values
    return kinds * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size() * size
