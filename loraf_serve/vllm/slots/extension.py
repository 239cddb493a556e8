"""What an engine of the slots backend adds to vLLM's worker class.

The engine names `WorkerExtension` as its worker extension (`--worker-extension-cls`). vLLM imports this module in every
worker of that engine, after its own worker classes and before the model is loaded, and in no other process: importing
it puts LoRAF's LoRA manager, and on the CPU LoRAF's LoRA products, in the place of vLLM's. Engines without the
extension are never touched.
"""

from __future__ import annotations

import functools

import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.platforms import current_platform

from loraf_serve.vllm.slots import punica_cpu
from loraf_serve.vllm.slots.manager import SlotsLoRAManager
from loraf_serve.vllm.worker import waiting
from loraf_serve.vllm.worker.remote import CORES, RemoteCalls


class WorkerExtension(RemoteCalls):
    manager_class = SlotsLoRAManager


def install() -> None:
    """Replaces names where vLLM looks them up when it loads a model with LoRA."""
    waiting.install()
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = functools.partial(SlotsLoRAManager, cores=CORES)
    if current_platform.is_cpu():
        wrapper = punica_cpu.GroupedPunicaWrapperCPU
        name = f"{wrapper.__module__}.{wrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


install()
