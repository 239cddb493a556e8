"""What each backend takes of which memory, and what is free. Numbers of one process or GPU are of the fullest one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from loraf.errors import ConfigError, Problem, one_line
from loraf.manifest import Manifest
from loraf.units import size_text
from loraf_serve.check import sizes
from loraf_serve.check.sizes import ModelSize

if TYPE_CHECKING:
    from loraf_serve.vllm.engine.plan import EnginePlan

MAIN, GPU = "main memory", "GPU memory"
_KV_CACHE = "KV cache"
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Use:
    """Memory that one thing takes.

    Attributes:
        place: MAIN or GPU.
        detail: what is held, in words.
    """

    what: str
    nbytes: int
    place: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """What a start would take.

    Attributes:
        free: place → bytes that are free now, of every place that is used.
        kv_tokens: that fit into the KV cache together.
        max_model_len: of prompt and answer together, in tokens.
        needs_whole_prompt: the engine refuses to start if the KV cache holds fewer than `max_model_len` tokens.
    """

    dtype: torch.dtype
    uses: tuple[Use, ...]
    free: dict[str, int]
    kv_tokens: int
    max_model_len: int
    needs_whole_prompt: bool = False

    def needed(self, place: str) -> int:
        return sum(use.nbytes for use in self.uses if use.place == place)

    def problems(self) -> list[Problem]:
        """What does not fit, with the bytes that are missing."""
        problems = []
        for place, free in self.free.items():
            missing = self.needed(place) - free
            if missing > 0:
                largest = max((use for use in self.uses if use.place == place), key=lambda use: use.nbytes)
                message = (
                    f"{size_text(missing)} of {place} are missing: {size_text(self.needed(place))} are needed, most of "
                    f"it for {largest.what}, and {size_text(free)} are free"
                )
                problems.append(Problem(message, "--model", remedy=_remedy(place, largest)))
        if self.needs_whole_prompt and self.kv_tokens < self.max_model_len:
            message = (
                f"the KV cache has room for {self.kv_tokens:,} tokens, and one request may have {self.max_model_len:,}"
            )
            remedy = f"set --max-model-len to at most {max(self.kv_tokens, 1)}, or give the KV cache more memory"
            problems.append(Problem(message, "--max-model-len", remedy=remedy))
        return problems


def _remedy(place: str, largest: Use) -> str:
    if largest.what == _KV_CACHE:
        return f"free some, or lower {'--gpu-memory-utilization' if place == GPU else '--kv-cache-memory-bytes'}"
    remedy = "free some, serve fewer adapters or tasks (--adapter CKPT@task+task), or use a smaller --dtype"
    return f"{remedy} or more GPUs (--tensor-parallel-size)" if place == GPU else remedy


def free_main_memory() -> int:
    """Bytes that are free for this process and its children: on the machine, or in their container if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            taken = int((_CGROUP / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            free = min(free, max(0, int(limit) - taken))
    except (OSError, ValueError):  # no control group of version 2
        pass
    return free


def free_gpu_memory() -> int:
    """Free bytes of the first GPU."""
    return int(torch.cuda.mem_get_info(0)[0])


def merged_plan(
    model_folder: Path, model: ModelSize, manifests: dict[str, Manifest], dtype: str | None, max_model_len: int | None
) -> Plan:
    """What the merged backend would take.

    Args:
        manifests: of each adapter by name.
        dtype, max_model_len: as `MergedBackend`.

    Raises:
        ConfigError: it cannot load this model, or an option is out of range.
    """
    from transformers import AutoConfig

    from loraf import base_files
    from loraf_serve.backends import merged

    base_files.require_loadable(model_folder)
    try:
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        message, remedy = f"could not be loaded ({one_line(error)})", "use a model that transformers knows"
        raise ConfigError(Problem(message, file=str(model_folder), remedy=remedy)) from None
    merged.require_only_attention(model_folder, config)
    chosen = merged.dtype_of(dtype or "auto")
    text = config.get_text_config(decoder=True)
    in_use = chosen if isinstance(chosen, torch.dtype) else _own_dtype(config)
    limit = merged.context_limit(max_model_len, getattr(text, "max_position_embeddings", None))
    on_gpu = torch.cuda.is_available()
    place = GPU if on_gpu else MAIN
    free = {place: free_gpu_memory() if on_gpu else free_main_memory()} | ({MAIN: free_main_memory()} if on_gpu else {})
    weights = model.nbytes(in_use)
    kv_cache = max(0, int(merged.KV_SHARE * (free[place] - weights)))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head * in_use.itemsize
    copies = sizes.changed_weights_bytes(list(manifests.values()), in_use)
    uses = [
        Use("model weights", weights, place, str(in_use).removeprefix("torch.")),
        *(
            Use(f"adapter {name}", sizes.a_bytes(manifest, torch.float32), place, "A in float32")
            for name, manifest in manifests.items()
        ),
        *(Use(f"adapter {name}", sizes.values_bytes(manifest), MAIN, "values") for name, manifest in manifests.items()),
        *([Use("all adapters", copies, place, "copies of the weights that they change")] if manifests else []),
        Use(_KV_CACHE, kv_cache, place, f"at most, {merged.KV_SHARE:.0%} of what the weights leave"),
    ]
    return Plan(in_use, tuple(uses), free, kv_cache // per_token, limit)


def _own_dtype(config: object) -> torch.dtype:
    """The dtype that config.json names, which transformers loads the model in."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def vllm_plan(engine: EnginePlan, model: ModelSize, manifests: dict[str, Manifest]) -> Plan:
    """What a vLLM engine would take, in main memory or on each of its GPUs.

    Args:
        manifests: of each adapter by name.
    """
    place = GPU if engine.on_gpu else MAIN
    workers = 1 if not engine.on_gpu else engine.workers  # on a CPU they share the memory
    weights = model.nbytes(engine.dtype) // workers
    uses = [Use("model weights", weights, place, str(engine.dtype).removeprefix("torch."))]
    for name, manifest in manifests.items():
        if engine.slots:
            nbytes = sizes.a_bytes(manifest, engine.lora_dtype) + sizes.values_bytes(manifest)
            uses.append(Use(f"adapter {name}", nbytes * engine.workers, MAIN, "A and values, in every worker"))
        elif engine.on_gpu:
            nbytes = sizes.on_gpu_bytes(manifest, engine.lora_dtype)
            uses.append(Use(f"adapter {name}", nbytes, place, "A, dense B of all tasks and its owners"))
        else:
            nbytes = sizes.packed_bytes(manifest, engine.lora_dtype)
            uses.append(Use(f"adapter {name}", nbytes, place, "A and values, packed for the kernel"))
    if engine.slots:
        nbytes = sizes.slots_bytes(model, engine.slots, engine.slot_rank, engine.lora_dtype)
        uses.append(Use("LoRA slots", nbytes, place, f"{engine.slots} of rank {engine.slot_rank}"))
        largest = max((sizes.b_bytes(manifest, engine.lora_dtype) for manifest in manifests.values()), default=0)
        built = engine.built_sets * largest * engine.workers
        uses.append(Use("built task sets", built, MAIN, f"at most {engine.built_sets}, B of each"))
    kv_cache = engine.kv_cache_bytes
    if kv_cache is None:
        # vLLM measures what a step needs beside these; it is not known before a start.
        taken = sum(use.nbytes for use in uses if use.place == place and not use.what.startswith("adapter "))
        kv_cache, detail = max(0, int(engine.share * engine.memory) - taken), f"at most, in {engine.share:.0%} of it"
    else:
        kv_cache, detail = kv_cache * (1 if engine.on_gpu else engine.workers), "reserved at start"
    uses.append(Use(_KV_CACHE, kv_cache, place, detail))
    free = {MAIN: free_main_memory()} | ({GPU: free_gpu_memory()} if engine.on_gpu else {})
    per_worker = kv_cache // (1 if engine.on_gpu else engine.workers)
    # vLLM has whole blocks, and keeps one of them empty.
    tokens = max(0, per_worker // (engine.kv_bytes_per_token * engine.block) - 1) * engine.block
    return Plan(engine.dtype, tuple(uses), free, tokens, engine.max_model_len, engine.keeps_every_token)


def adapter_memory_problem(plan: Plan, limit: int | None) -> Problem | None:
    """The problem if all adapters together take more than `--adapter-memory`."""
    uses = [use for use in plan.uses if use.what.startswith("adapter ")]
    taken = sum(use.nbytes for use in uses)
    if limit is None or taken <= limit:
        return None
    message = (
        f"the adapters take {size_text(taken)}, {size_text(taken - limit)} more than the {size_text(limit)} allowed"
    )
    return Problem(message, "--adapter-memory", remedy="raise it, or serve fewer adapters or tasks")
