"""The common part of vLLM's worker extensions: puts LoRAF's parts in place of vLLM's.

An engine names its extension class in its arguments. vLLM imports the class's module in every worker of that engine,
after its own worker classes and before the model is loaded, and in no other process. So importing an extension module
may replace parts of vLLM, and engines without the extension are never affected.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.platforms import current_platform

from loraf_serve.vllm.worker import seeds, waiting
from loraf_serve.vllm.worker.remote import CORES

if TYPE_CHECKING:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from loraf_serve.vllm.worker.manager import CheckpointLoRAManager


def install(
    manager_class: type[CheckpointLoRAManager[Any, Any]], cpu_products: type[PunicaWrapperCPU] | None = None
) -> None:
    """Replaces names where vLLM looks them up when it loads a model with LoRA.

    Args:
        manager_class: the LoRA manager.
        cpu_products: vLLM's LoRA products on the CPU; None to keep vLLM's own.
    """
    waiting.install()
    seeds.install()
    # The mixin imports the name and looks it up among its own.
    vars(lora_model_runner_mixin)["LRUCacheWorkerLoRAManager"] = functools.partial(manager_class, cores=CORES)
    if cpu_products is not None and current_platform.is_cpu():
        name = f"{cpu_products.__module__}.{cpu_products.__qualname__}"
        platform: Any = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda cls: name)
