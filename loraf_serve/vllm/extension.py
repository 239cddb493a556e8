"""What an engine of the slots backend adds to vLLM's worker class.

The engine names `WorkerExtension` as its worker extension (`--worker-extension-cls`). vLLM imports this module in every
worker of that engine, after its own worker classes and before the model is loaded, and in no other process: importing
it puts LoRAF's LoRA manager, and on the CPU LoRAF's LoRA products, in the place of vLLM's. Engines without the
extension are never touched.
"""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.platforms import current_platform

from loraf_serve.vllm import punica_cpu
from loraf_serve.vllm.worker import SlotsLoRAManager


class WorkerExtension:
    """Remote calls of the backend (`AsyncLLM.collective_rpc`). Arguments and results are plain values; none raises."""

    def loraf_layers(self) -> dict[str, list[int]] | None:
        """Name → [d_out, d_in] of each layer that LoRA applies to; None if LoRAF's manager is not in place."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, SlotsLoRAManager):
            return None
        return {name: list(shape) for name, shape in manager.layer_shapes().items()}

    def loraf_begin_load(self, folder: str, tasks: list[str], digest: str) -> None:
        """Starts to read and verify a checkpoint in a thread."""
        self.model_runner.lora_manager.store.begin(folder, tasks, digest)

    def loraf_load_state(self, digest: str) -> dict[str, Any] | None:
        """See `CheckpointStore.state`."""
        return self.model_runner.lora_manager.store.state(digest)


def install() -> None:
    """Replaces names where vLLM looks them up when it loads a model with LoRA."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = SlotsLoRAManager
    if current_platform.is_cpu():
        wrapper = punica_cpu.GroupedPunicaWrapperCPU
        name = f"{wrapper.__module__}.{wrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


install()
