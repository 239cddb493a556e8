"""The calls that a backend makes in its workers (`AsyncLLM.collective_rpc`)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from loraf_serve.vllm.naming import ENGINE_OWNER
from loraf_serve.vllm.worker.notice import Notice
from loraf_serve.vllm.worker.store import raise_error
from loraf_serve.vllm.worker.waiting import pause_until

if TYPE_CHECKING:
    from loraf_serve.vllm.worker.manager import CheckpointLoRAManager

_POLL_SECONDS = 5.0  # detects a worker that has died or cannot give notice

# Calls a method of `RemoteCalls` in every worker, by name, with its arguments; returns each worker's result.
CallWorkers = Callable[..., Awaitable[list[Any]]]


def _cores() -> list[int]:
    """Returns the processors of the service, which started the engine. vLLM binds a worker to some of them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(int(os.environ.get(ENGINE_OWNER, 0))))


CORES = _cores()


class ModelRunner(Protocol):
    """The part of vLLM's model runner that remote calls use."""

    lora_manager: CheckpointLoRAManager[Any, Any]


class RemoteCalls:
    """Base class of the worker extensions. Arguments and results are plain values; no method raises.

    Attributes:
        manager_class: the LoRA manager that the extension puts in place of vLLM's.
        model_runner: vLLM's, set by its worker class.
    """

    manager_class: type[CheckpointLoRAManager[Any, Any]]
    model_runner: ModelRunner

    def loraf_layers(self) -> dict[str, list[int]] | None:
        """Returns name → [d_out, d_in] of each layer that LoRA applies to, or None if LoRAF's manager is not in use."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, self.manager_class):
            return None
        return {name: list(shape) for name, shape in manager.layer_shapes().items()}

    def loraf_begin_proof(self) -> None:
        """Begins to record the calls of layers."""
        self.model_runner.lora_manager.begin_proof(self.model_runner)

    def loraf_recorded(self) -> list[str]:
        """Returns the kinds of steps recorded so far, see `loraf_serve.vllm.worker.calls`."""
        proof = self.model_runner.lora_manager.proof
        return sorted(proof.recorded()) if proof is not None else []

    def loraf_end_recording(self) -> None:
        proof = self.model_runner.lora_manager.proof
        if proof is not None:
            proof.stop_recording()

    def loraf_compare(self, elements: int) -> bool:
        """Compares the next layers with the model's files, see `Proof.compare`. Returns whether all have been."""
        manager = self.model_runner.lora_manager
        done = manager.proof is None or manager.proof.compare(elements)
        if done and manager.proof is not None:
            manager.proven(manager.proof)
        return done

    def loraf_problems(self) -> dict[str, str]:
        """Returns module → why nothing is proven of it, by vLLM's names."""
        manager = self.model_runner.lora_manager
        found = {name: manager.proof.problem(name) for name in manager.layer_shapes()} if manager.proof else {}
        return {name: problem for name, problem in found.items() if problem}

    def loraf_begin_load(self, folder: str, tasks: list[str], digest: str, notice: str) -> None:
        """Starts reading and preparing a checkpoint in threads.

        Args:
            notice: path of a `Notice`, given when the load is over.
        """
        pause_until(self.model_runner.lora_manager.store.begin(folder, tasks, digest, notice))

    def loraf_load_state(self, digest: str) -> dict[str, Any] | None:
        """Returns None while the checkpoint is loading, {"bytes": n} once it can be served, or an error as
        `CheckpointStore.state` describes it."""
        manager = self.model_runner.lora_manager
        state = manager.store.state(digest)
        return {"bytes": manager.activate(digest)} if state == {} else state

    def loraf_drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint that no request uses.

        Args:
            lora_ids: vLLM's ids of its task sets.
        """
        self.model_runner.lora_manager.drop(digest, lora_ids)


async def load(call: CallWorkers, folder: str, tasks: Sequence[str], digest: str) -> int:
    """Has every worker read and prepare a checkpoint, and waits until all are done.

    Returns:
        The checkpoint's bytes in all workers.

    Raises:
        LorafError: a worker refused the checkpoint.
        RuntimeError: a worker failed for another reason.
    """
    with Notice() as notice:
        await call("loraf_begin_load", folder, list(tasks), digest, notice.path)
        states: list[dict[str, Any] | None] = [None]
        while None in states:
            await notice.wait(_POLL_SECONDS)
            states = await call("loraf_load_state", digest)
    loaded = [state for state in states if state is not None]
    for state in loaded:
        raise_error(state)
    return sum(state["bytes"] for state in loaded)
