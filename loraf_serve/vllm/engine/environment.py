"""The environment in which vLLM is imported and starts its processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from loraf_serve.vllm.naming import ENGINE_OWNER


def quiet() -> None:
    """Limits vLLM's log to errors, unless the user has set VLLM_LOGGING_LEVEL."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.ERROR)


@contextmanager
def engine_environment(more: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Sets the environment that vLLM's processes inherit, and restores this process's own at the end.

    Args:
        more: additional variables.
    """
    quiet()
    required = {
        ENGINE_OWNER: str(os.getpid()),
        # A fork of a process with threads (gRPC's) may hang.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # The model is a local folder by now, so nothing may be looked up on a hub.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **more,
    }
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if "VLLM_PLUGINS" in os.environ:  # the only plugins that vLLM loads
        required["VLLM_PLUGINS"] = os.environ["VLLM_PLUGINS"] + ",loraf"
    before = {name: os.environ.get(name) for name in required | defaults}
    os.environ.update({name: value for name, value in defaults.items() if name not in os.environ} | required)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
