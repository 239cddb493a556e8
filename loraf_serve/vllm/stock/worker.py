"""What the workers of a stock `vllm serve --enable-lora` get: LoRAF checkpoints in memory, beside vLLM's own adapters.

vLLM imports this module in every worker of such a server (see `loraf_serve.vllm.stock.install`). As long as no LoRAF
checkpoint is named, a worker does what it would do without it.
"""

from __future__ import annotations

import functools

import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.slots.manager import SlotsLoRAManager
from loraf_serve.vllm.slots.punica_cpu import GroupedPunicaWrapperCPU
from loraf_serve.vllm.worker import waiting
from loraf_serve.vllm.worker.remote import CORES, RemoteCalls


class StockPunicaWrapperCPU(GroupedPunicaWrapperCPU):
    """vLLM's own LoRA products on the CPU until a LoRAF checkpoint is named, then the grouped ones, for every adapter.

    vLLM's own ones give rows without an adapter another adapter's delta.

    Attributes:
        grouped: of this process, for good once set.
    """

    grouped = False

    def _products(self) -> object:
        return super() if StockPunicaWrapperCPU.grouped else super(GroupedPunicaWrapperCPU, self)

    def add_shrink(self, *args, **kwargs) -> None:
        self._products().add_shrink(*args, **kwargs)

    def add_expand(self, *args, **kwargs) -> None:
        self._products().add_expand(*args, **kwargs)

    def add_lora_linear(self, *args, **kwargs) -> None:
        self._products().add_lora_linear(*args, **kwargs)


class StockLoRAManager(SlotsLoRAManager):
    """Knows LoRAF's task sets, and puts LoRA layers where vLLM does: its own adapters may need all of them."""

    _manager_cls = LRUCacheLoRAModelManager

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if parse_lora_path(lora_request.lora_path) is not None:
            StockPunicaWrapperCPU.grouped = True
        return super()._load_adapter(lora_request)


class WorkerExtension(RemoteCalls):
    manager_class = StockLoRAManager


def install() -> None:
    """Replaces names where vLLM looks them up when it loads a model with LoRA."""
    waiting.install()
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = functools.partial(StockLoRAManager, cores=CORES)
    # Another platform's plugin may name products of its own.
    if current_platform.is_cpu() and current_platform.get_punica_wrapper().endswith(f".{PunicaWrapperCPU.__name__}"):
        name = f"{StockPunicaWrapperCPU.__module__}.{StockPunicaWrapperCPU.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


install()
