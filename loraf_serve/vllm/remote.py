"""What a backend may call in its workers (`AsyncLLM.collective_rpc`): the common part of the worker extensions."""

from __future__ import annotations

import os
from typing import Any

from loraf_serve.vllm.plugin import ENGINE_OWNER


def _cores() -> list[int]:
    """Those of the service, which started the engine: vLLM binds a worker to some of them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(int(os.environ.get(ENGINE_OWNER, 0))))


CORES = _cores()


class RemoteCalls:
    """Arguments and results are plain values; none raises.

    Attributes:
        manager_class: the LoRA manager that the extension puts in the place of vLLM's.
    """

    manager_class: type

    def loraf_layers(self) -> dict[str, list[int]] | None:
        """Name → [d_out, d_in] of each layer that LoRA applies to; None if LoRAF's manager is not in place."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, self.manager_class):
            return None
        return {name: list(shape) for name, shape in manager.layer_shapes().items()}

    def loraf_begin_load(self, folder: str, tasks: list[str], digest: str) -> None:
        """Starts to read and prepare a checkpoint in threads."""
        self.model_runner.lora_manager.store.begin(folder, tasks, digest)

    def loraf_load_state(self, digest: str) -> dict[str, Any] | None:
        """None: not yet. {"bytes": n}: from now on it can be served, and takes so much. Else as `CheckpointStore.state`
        tells an error."""
        manager = self.model_runner.lora_manager
        state = manager.store.state(digest)
        return {"bytes": manager.loaded(digest)} if state == {} else state

    def loraf_drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint that no request names any more; `lora_ids`: vLLM's ids of its sets."""
        self.model_runner.lora_manager.drop(digest, lora_ids)
