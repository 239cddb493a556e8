"""vLLM's metrics of a stock server with resident workers."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY


def drop_sets(engine_client: Any) -> None:
    """Removes `vllm:lora_requests_info`: it is about slots, and it keeps an entry for every combination of task sets
    that ever ran together, so free weights would fill the memory.

    Args:
        engine_client: an AsyncLLM.
    """
    manager = getattr(engine_client, "logger_manager", None)
    for logger in getattr(manager, "stat_loggers", ()):
        gauge = getattr(logger, "gauge_lora_info", None)
        if gauge is not None:
            logger.gauge_lora_info = None
            REGISTRY.unregister(gauge)
