"""Two ways to serve task sets on vLLM: `slots`, a LoRA slot for each set, and `resident`, one adapter for all sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf_serve.backends.backend import BackendUnavailable
from loraf_serve.vllm.engine.slot_queue import SlotAdmission
from loraf_serve.vllm.engine.support import can_serve
from loraf_serve.vllm.engine.vllm_backend import LoraRequests, VllmBackend
from loraf_serve.vllm.resident.compiling import KEEP, keep_compile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest

__all__ = ["ResidentBackend", "SlotsBackend", "can_serve"]

_REMEMBERED = 1024  # sets that no request uses; each is a name and a number


class SlotsBackend(VllmBackend):
    """A set is a slot, built in vLLM's worker from the checkpoint. Sets beyond the number of slots (`--max-loras`) wait
    their turn. Base requests need no slot and never wait."""

    name = "slots"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._admission = SlotAdmission(0)  # the engine says how many slots there are

    def _engine_args(self) -> AsyncEngineArgs:
        from loraf_serve.vllm.engine.options import slots_args

        return slots_args(self._model_folder, self._engine_options, self._max_rank, self._reserve)

    def _configured(self, config: VllmConfig) -> None:
        lora = config.lora_config
        self._admission = SlotAdmission(lora.max_loras)
        # A set without a slot is remembered as long as the workers keep it built.
        self._lora_requests = LoraRequests(first_id=lora.max_loras + 1, idle=lora.max_cpu_loras)

    @asynccontextmanager
    async def _lora_request(self, key: str) -> AsyncIterator[LoRARequest]:
        async with self._admission.slot(key):
            yield self._lora_requests.get(key, self._admission.admitted)

    def _end_waiting(self, error: BackendUnavailable) -> None:
        self._admission.end(error)


class ResidentBackend(VllmBackend):
    """A checkpoint stands once in each worker, and a set is a row of weights: any number of sets mix in a batch."""

    name = "resident"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._in_use: Counter[str] = Counter()

    def _environment(self) -> dict[str, str]:
        return {KEEP: "1"}

    def _engine_args(self) -> AsyncEngineArgs:
        from loraf_serve.vllm.engine.options import resident_args

        keep_compile()
        return resident_args(self._model_folder, self._engine_options, self._reserve)

    def _configured(self, config: VllmConfig) -> None:
        lora = config.lora_config
        if lora.lora_dtype is not config.model_config.dtype:
            message = f"{lora.lora_dtype} is not the model's, {config.model_config.dtype}, in which the kernels work"
            raise ConfigError(Problem(message, "--lora-dtype", remedy="leave it out, or serve with --backend slots"))
        # A row for every sequence of a batch, so that the scheduler never makes a set wait for another.
        lora.max_loras = lora.max_cpu_loras = config.scheduler_config.max_num_seqs
        lora.max_lora_rank = max(self._max_rank, 64)  # a GPU's kernels are made for it before a checkpoint is loaded
        self._lora_requests = LoraRequests(first_id=lora.max_loras + 1, idle=_REMEMBERED)

    @asynccontextmanager
    async def _lora_request(self, key: str) -> AsyncIterator[LoRARequest]:
        self._in_use[key] += 1
        try:
            yield self._lora_requests.get(key, self._in_use)
        finally:
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]
