"""Worker extensions for benchmarks/architectures.py, which serve a checkpoint in a folder named `unguarded…` although
nothing is proven of its modules. What it answers shows whether the refusal was needed.

vLLM imports this module in its workers.
"""

from __future__ import annotations

import functools
from typing import Any

FOLDER = "unguarded"  # beginning of the name of a checkpoint's folder


def _serve_unguarded() -> None:
    from loraf_serve.vllm.worker import targets
    from loraf_serve.vllm.worker.proof import Proof

    stock = targets.require_layers

    def require_layers(manifest: Any, shapes: Any, model: Any, where: str, not_proven: Any) -> None:
        unguarded = where.rpartition("/")[2].startswith(FOLDER)
        stock(manifest, shapes, model, where, (lambda name: None) if unguarded else not_proven)

    targets.require_layers = require_layers
    Proof.is_any_proven = lambda self, layer: True  # type: ignore[method-assign]


def __getattr__(name: str) -> Any:
    """The extension of the backend `name`. Importing one installs it, so only the engine's own is imported."""
    return _extension(name)


@functools.cache
def _extension(name: str) -> Any:
    if name == "resident":
        from loraf_serve.vllm.resident.extension import WorkerExtension as Extension
    elif name == "slots":
        from loraf_serve.vllm.slots.extension import WorkerExtension as Extension
    else:
        raise AttributeError(name)
    _serve_unguarded()

    class WorkerExtension(Extension):
        def vllm_names(self, modules: list[str]) -> dict[str, str]:
            """Returns module in transformers → its name in vLLM."""
            from loraf_serve.vllm.worker.targets import vllm_name

            model: Any = self.model_runner.lora_manager._adapter_manager.model
            return {module: vllm_name(model, module) for module in modules}

    return WorkerExtension
