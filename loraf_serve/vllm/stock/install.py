"""A stock `vllm serve --enable-lora` with loraf installed serves LoRAF checkpoints through its OpenAI-compatible API.

    vllm serve M --enable-lora --lora-modules math=./ckpt@math ckpt=./ckpt

vLLM calls the plugin (`install`) before it makes a server's configuration. There the server is given two things, and
only if LoRA is switched on: a worker extension (`stock_worker`), and models that know task sets (`stock_models`).

    stock_checkpoints    which checkpoint and set a path or a name means; what is refused
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING

from loraf_serve.vllm.naming import STOCK_EXTENSION

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

_logger = logging.getLogger(f"vllm.{__name__}")


def install() -> None:
    """Looks at each server's configuration that this process makes. Called twice, it acts once."""
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:  # a process that makes no configuration
        return
    stock = arg_utils.EngineArgs.create_engine_config
    if hasattr(stock, "loraf"):
        return

    @functools.wraps(stock)
    def create_engine_config(self, usage_context=None, *args, **kwargs):
        prepare(self, usage_context)
        return stock(self, usage_context, *args, **kwargs)

    create_engine_config.loraf = True
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def prepare(engine_args: EngineArgs, usage_context: UsageContext | None) -> None:
    """Lets a server that is about to be configured serve task sets; other engines are left alone."""
    import vllm
    from vllm.usage.usage_lib import UsageContext

    if not engine_args.enable_lora or usage_context is not UsageContext.OPENAI_API_SERVER:
        return
    from loraf_serve.vllm.relied_on import RELEASE

    if not vllm.__version__.startswith(RELEASE):
        _logger.warning(
            "loraf was made for vLLM %sx and stays out of this vLLM %s: no LoRAF checkpoints", RELEASE, vllm.__version__
        )
        return
    from vllm.entrypoints.launchers.api_server import app_state

    from loraf_serve.vllm.stock.models import TaskSetModels

    app_state.OpenAIServingModels = TaskSetModels
    if not engine_args.worker_extension_cls:
        engine_args.worker_extension_cls = STOCK_EXTENSION
