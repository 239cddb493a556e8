"""What a backend may call in its workers (`AsyncLLM.collective_rpc`): the common part of the worker extensions, and the
calls that belong together."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from loraf_serve.vllm.naming import ENGINE_OWNER
from loraf_serve.vllm.worker.notice import Notice
from loraf_serve.vllm.worker.waiting import pause_until

_ASK_SECONDS = 5.0  # a worker that cannot give notice, or has died, is found out by asking


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

    def loraf_begin_load(self, folder: str, tasks: list[str], digest: str, notice: str) -> None:
        """Starts to read and prepare a checkpoint in threads. `notice`: see `Notice`, given when it is over."""
        pause_until(self.model_runner.lora_manager.store.begin(folder, tasks, digest, notice))

    def loraf_load_state(self, digest: str) -> dict[str, Any] | None:
        """None: not yet. {"bytes": n}: from now on it can be served, and takes so much. Else as `CheckpointStore.state`
        tells an error."""
        manager = self.model_runner.lora_manager
        state = manager.store.state(digest)
        return {"bytes": manager.loaded(digest)} if state == {} else state

    def loraf_drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint that no request names any more; `lora_ids`: vLLM's ids of its sets."""
        self.model_runner.lora_manager.drop(digest, lora_ids)


async def load(
    call: Callable[..., Awaitable[list]], folder: str, tasks: Sequence[str], digest: str
) -> list[dict[str, Any]]:
    """Has every worker read and prepare a checkpoint, and waits for it.

    Args:
        call: calls a method of `RemoteCalls` in every worker: its name, its arguments.

    Returns:
        Of each worker what `loraf_load_state` says at the end.
    """
    with Notice() as notice:
        await call("loraf_begin_load", folder, list(tasks), digest, notice.path)
        while True:
            await notice.wait(_ASK_SECONDS)
            states = await call("loraf_load_state", digest)
            if None not in states:
                return states
