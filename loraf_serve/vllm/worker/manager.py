"""Base classes of the LoRA managers in vLLM's workers: they store checkpoints and put LoRA on linear layers only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loraf.errors import ConfigError, Problem
from loraf.manifest import Manifest
from loraf.manifest_view import CheckpointManifestView
from loraf_serve.vllm.worker import targets
from loraf_serve.vllm.worker.proof import Proof
from loraf_serve.vllm.worker.store import CheckpointStore


class Sized(Protocol):
    """A prepared checkpoint."""

    @property
    def nbytes(self) -> int: ...


C = TypeVar("C", bound=CheckpointManifestView)
P = TypeVar("P", bound=Sized)


class LinearOnlyModelManager(LRUCacheLoRAModelManager):
    """Puts LoRA layers on linear layers only.

    vLLM would also put them on embeddings and the output head, where they cost memory (vocabulary × rank per slot) and
    time in every step, for base rows too.
    """

    def _create_lora_modules(self) -> None:
        embeddings = self.model.embedding_modules
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in embeddings]
        super()._create_lora_modules()  # type: ignore[no-untyped-call]  # vLLM leaves it unannotated


class CheckpointLoRAManager(LRUCacheWorkerLoRAManager, Generic[C, P]):
    """vLLM's own manager with a store of checkpoints. A subclass defines how a checkpoint is opened and prepared.

    Args:
        cores: processors that loading may use.
    """

    _manager_cls: type[LRUCacheLoRAModelManager] = LinearOnlyModelManager

    def __init__(self, vllm_config: VllmConfig, *args: Any, cores: Sequence[int] = (), **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        self._model_config = vllm_config.model_config
        self._weights_are_random = vllm_config.load_config.load_format == "dummy"
        self.proof: Proof | None = None
        self.store: CheckpointStore[C, P] = CheckpointStore(self._open, self._prepare, cores)

    def _open(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[C]:
        """See `CheckpointStore`."""
        raise NotImplementedError

    def _prepare(self, checkpoint: C, pool: ThreadPoolExecutor) -> P:
        """See `CheckpointStore`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The engine's LoRA dtype."""
        dtype = self.lora_config.lora_dtype
        assert isinstance(dtype, torch.dtype)  # vLLM has resolved names by now
        return dtype

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """vLLM calls it at the beginning of every step."""
        self.store.step_back()
        if self.proof is not None and mapping is not None:
            self.proof.begin_step(len(mapping.index_mapping), len(mapping.prompt_mapping))
        super().set_active_adapters(requests, mapping)

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        return targets.layer_shapes(self._adapter_manager)

    def begin_proof(self, runner: Any) -> Proof:
        """Returns a new proof, which begins to record. Until it is complete, every checkpoint is refused.

        Args:
            runner: vLLM's model runner.
        """
        model = self._model_config
        assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved names by now
        folder = None if self._weights_are_random else model.model
        self.proof = Proof(self._adapter_manager, runner, folder, model.revision, model.dtype)
        self.proof.start_recording()
        return self.proof

    def proven(self, proof: Proof) -> None:
        """Called when the proof is complete."""

    def require_layers(self, manifest: Manifest, where: str) -> None:
        """Checks that vLLM applies an adapter to the modules of a checkpoint as transformers would.

        Args:
            where: the checkpoint's folder, for messages.

        Raises:
            BaseMismatch, NotProven: as `targets.require_layers`.
            ConfigError: nothing has been proven yet.
        """
        if self.proof is None:
            message = "vLLM's layers have not been compared with the model's files"
            raise ConfigError(Problem(message, remedy="load the checkpoint once the server has started"))
        shapes, model = self.layer_shapes(), self._adapter_manager.model
        targets.require_layers(manifest, shapes, model, where, self.proof.problem)

    def activate(self, digest: str) -> int:
        """Makes a loaded checkpoint available to requests. Returns its bytes in this worker, without slots."""
        return self.store.get(digest).nbytes

    def drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint and its task sets. None of its requests may be running."""
        for lora_id in lora_ids:
            self.remove_adapter(lora_id)
        self.store.drop(digest)
