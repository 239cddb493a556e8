"""vLLM's own Prometheus metrics, for a server with --metrics-port, in prometheus_client's default registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import PrometheusStatLogger

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class EngineMetrics(PrometheusStatLogger):
    """vLLM's metrics without `vllm:lora_requests_info`.

    That one joins the names of all LoRA requests in flight to a label. Here a name is a task set, so nearly every step
    would begin a new time series.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None):
        super().__init__(vllm_config, engine_indexes)
        if self.gauge_lora_info is not None:
            REGISTRY.unregister(self.gauge_lora_info)
            self.gauge_lora_info = None
