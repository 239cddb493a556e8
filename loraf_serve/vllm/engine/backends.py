"""The two vLLM backends: `slots`, a LoRA slot for each task set, and `resident`, one adapter for all sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from loraf.errors import ConfigError, Problem
from loraf_serve.backends.backend import BackendUnavailable
from loraf_serve.vllm.engine.lora_requests import LoraRequests
from loraf_serve.vllm.engine.slot_queue import SlotAdmission
from loraf_serve.vllm.engine.support import can_serve
from loraf_serve.vllm.engine.vllm_backend import VllmBackend
from loraf_serve.vllm.resident.compiling import KEEP, keep_compile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest

__all__ = ["ResidentBackend", "SlotsBackend", "can_serve"]

_IDLE_SETS = 1024  # unused sets to remember; each is a name and a number


class SlotsBackend(VllmBackend):
    """Serves each task set from a LoRA slot, built in vLLM's worker from the checkpoint. If there are more sets than
    slots (`--max-loras`), they take turns. Base requests need no slot and never wait."""

    name = "slots"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._admission = SlotAdmission(0)  # replaced when the number of slots is known

    def _engine_args(self) -> AsyncEngineArgs:
        from loraf_serve.vllm.engine.arguments import slots_args

        return slots_args(self._model_folder, self._engine_options, self._max_rank, self._reserve)

    def _configured(self, config: VllmConfig) -> None:
        lora = config.lora_config
        assert lora is not None and lora.max_cpu_loras is not None  # arguments.py sets both
        self._admission = SlotAdmission(lora.max_loras)
        # An unused set is remembered as long as the workers keep it built.
        self._lora_requests = LoraRequests(first_id=lora.max_loras + 1, idle=lora.max_cpu_loras)

    @asynccontextmanager
    async def _lora_request(self, key: str, priority: int = 0) -> AsyncIterator[LoRARequest]:
        async with self._admission.slot(key, priority):
            yield self._lora_requests.get(key, self._admission.admitted)

    def _end_waiting(self, error: BackendUnavailable) -> None:
        self._admission.end(error)


class ResidentBackend(VllmBackend):
    """Keeps each checkpoint once per worker. A task set is a row of weights, so any number of sets mix in a batch."""

    name = "resident"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._in_use: Counter[str] = Counter()

    def _environment(self) -> dict[str, str]:
        return {KEEP: "1"}

    def _engine_args(self) -> AsyncEngineArgs:
        from loraf_serve.vllm.engine.arguments import resident_args

        keep_compile()
        return resident_args(self._model_folder, self._engine_options, self._reserve)

    def _configured(self, config: VllmConfig) -> None:
        lora = config.lora_config
        assert lora is not None  # arguments.py enables LoRA
        if lora.lora_dtype is not config.model_config.dtype:
            message = f"{lora.lora_dtype} differs from the model's {config.model_config.dtype}, which the kernels need"
            raise ConfigError(Problem(message, "--lora-dtype", remedy="leave it out, or serve with --backend slots"))
        # One set for every sequence of a batch, so that the scheduler never makes a set wait for another.
        lora.max_loras = lora.max_cpu_loras = config.scheduler_config.max_num_seqs
        # Fixes the size of the GPU kernel's memory. Need not be one of vLLM's ranks.
        lora.max_lora_rank = cast(Any, max(self._max_rank, 64))
        self._lora_requests = LoraRequests(first_id=lora.max_loras + 1, idle=_IDLE_SETS)

    @asynccontextmanager
    async def _lora_request(self, key: str, priority: int = 0) -> AsyncIterator[LoRARequest]:
        self._in_use[key] += 1
        try:
            yield self._lora_requests.get(key, self._in_use)
        finally:
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]
