"""A stock `vllm serve --enable-lora` with loraf installed serves LoRAF checkpoints through its OpenAI-compatible API.

    vllm serve M --enable-lora --lora-modules math=./ckpt@math ckpt=./ckpt

vLLM calls the plugin (`install`) before it creates a server's configuration. If LoRA is enabled, the configuration gets
a worker extension (`worker`), and the server gets models that include task sets (`models`).
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from loraf_serve.vllm.naming import STOCK_EXTENSION

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

_logger = logging.getLogger(f"vllm.{__name__}")


def install() -> None:
    """Makes vLLM call `prepare` for each configuration that this process creates. Idempotent."""
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:  # this process creates no configuration
        return
    stock = arg_utils.EngineArgs.create_engine_config
    if hasattr(stock, "loraf"):
        return

    @functools.wraps(stock)
    def create_engine_config(
        self: EngineArgs, usage_context: UsageContext | None = None, *args: Any, **kwargs: Any
    ) -> VllmConfig:
        prepare(self, usage_context)
        config: VllmConfig = stock(self, usage_context, *args, **kwargs)
        return config

    create_engine_config.loraf = True  # type: ignore[attr-defined]  # marks the function as ours
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def prepare(engine_args: EngineArgs, usage_context: UsageContext | None) -> None:
    """Lets the server that is about to be configured serve task sets. Other engines are not changed."""
    import vllm
    from vllm.usage.usage_lib import UsageContext

    if not engine_args.enable_lora or usage_context is not UsageContext.OPENAI_API_SERVER:
        return
    from loraf_serve.vllm.relied_on import RELEASE

    if not vllm.__version__.startswith(RELEASE):
        _logger.warning(
            "loraf supports vLLM %sx only, so this vLLM %s serves no LoRAF checkpoints", RELEASE, vllm.__version__
        )
        return
    from vllm.entrypoints.launchers.api_server import app_state

    from loraf_serve.vllm.stock.models import TaskSetModels

    vars(app_state)["OpenAIServingModels"] = TaskSetModels  # it imports the name and looks it up there
    if not engine_args.worker_extension_cls:
        engine_args.worker_extension_cls = STOCK_EXTENSION
