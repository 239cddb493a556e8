"""A stock `vllm serve --enable-lora` with loraf installed serves LoRAF checkpoints through its OpenAI-compatible API.

    vllm serve M --enable-lora --lora-modules math=./ckpt@math ckpt=./ckpt

vLLM calls the plugin (`install`) before it creates a server's configuration. If LoRA is enabled, the configuration gets
a worker extension (`worker`, or that of resident workers, see `choice`), and the server gets models that include task
sets (`models`).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError
from loraf_serve.vllm.naming import RESIDENT_EXTENSION, STOCK_EXTENSION
from loraf_serve.vllm.resident.compiling import KEEP, keep_compile
from loraf_serve.vllm.stock import choice

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

_logger = logging.getLogger(f"vllm.{__name__}")
_NOT_RESIDENT = f"{choice.BACKEND}={choice.RESIDENT}: each task set takes a LoRA slot instead, because %s"


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
        def create() -> VllmConfig:
            config: VllmConfig = stock(self, usage_context, *args, **kwargs)
            return config

        prepare(self, usage_context)
        return _resident_config(self, create) if self.worker_extension_cls == RESIDENT_EXTENSION else create()

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
    extension = STOCK_EXTENSION
    if _is_resident_asked():
        obstacle = choice.obstacle_in(engine_args)
        if obstacle is None:
            extension = RESIDENT_EXTENSION
        else:
            _logger.warning(_NOT_RESIDENT, obstacle)
    if engine_args.worker_extension_cls in ("", None, STOCK_EXTENSION, RESIDENT_EXTENSION):
        engine_args.worker_extension_cls = extension


def _is_resident_asked() -> bool:
    """Ends the process if the variable has an unknown value: nothing has started yet."""
    try:
        return choice.is_resident_asked()
    except ConfigError as error:
        print(f"loraf: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _resident_config(engine_args: EngineArgs, create: Callable[[], VllmConfig]) -> VllmConfig:
    """A configuration for resident workers; for slots, if it turns out that the model cannot be served so.

    Args:
        create: completes the arguments.
    """
    os.environ[KEEP] = "1"  # for the processes of this engine too
    keep_compile()
    config = create()
    obstacle = choice.obstacle_of(config)
    if obstacle is None:
        choice.without_slots(config)
        _logger.info("LoRAF's resident workers serve all task sets; --max-loras does not matter")
        return config
    _logger.warning(_NOT_RESIDENT, obstacle)
    del os.environ[KEEP]
    engine_args.worker_extension_cls = STOCK_EXTENSION
    return create()
