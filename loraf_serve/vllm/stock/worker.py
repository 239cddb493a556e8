"""The worker extension of a stock `vllm serve --enable-lora`: LoRAF checkpoints in addition to vLLM's own adapters.

vLLM imports this module in every worker of such a server, see `loraf_serve.vllm.stock.install`. Until a LoRAF
checkpoint is named, a worker behaves as it would without the extension.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from loraf_serve.vllm.naming import parse_lora_path
from loraf_serve.vllm.slots.manager import SlotsLoRAManager
from loraf_serve.vllm.slots.punica_cpu import GroupedPunicaWrapperCPU
from loraf_serve.vllm.worker.extension import install
from loraf_serve.vllm.worker.remote import RemoteCalls


class StockPunicaWrapperCPU(GroupedPunicaWrapperCPU):
    """vLLM's own LoRA products on the CPU until a LoRAF checkpoint is named, then the grouped ones, for every adapter.

    vLLM's own products give rows without an adapter another adapter's delta.

    Attributes:
        grouped: of this process; once set, it stays set.
    """

    grouped = False

    def _products(self) -> Any:
        return super() if StockPunicaWrapperCPU.grouped else super(GroupedPunicaWrapperCPU, self)

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        self._products().add_shrink(*args, **kwargs)

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        self._products().add_expand(*args, **kwargs)

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> None:
        self._products().add_lora_linear(*args, **kwargs)


class StockLoRAManager(SlotsLoRAManager):
    """Adds LoRAF's task sets, and puts LoRA layers where vLLM does, because its own adapters may need all of them."""

    _manager_cls = LRUCacheLoRAModelManager

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if parse_lora_path(lora_request.lora_path) is not None:
            StockPunicaWrapperCPU.grouped = True
        return super()._load_adapter(lora_request)


class WorkerExtension(RemoteCalls):
    manager_class = StockLoRAManager


def _has_stock_products() -> bool:
    """Whether the platform uses vLLM's own products. Another platform's plugin may name different ones."""
    return current_platform.is_cpu() and current_platform.get_punica_wrapper().endswith(f".{PunicaWrapperCPU.__name__}")


install(StockLoRAManager, StockPunicaWrapperCPU if _has_stock_products() else None)
