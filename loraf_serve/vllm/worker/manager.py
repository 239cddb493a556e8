"""What the LoRA managers of all backends share inside vLLM's worker: a store of checkpoints, and LoRA layers where an
adapter has any."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from vllm.config import VllmConfig
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loraf.described import Described
from loraf_serve.vllm.worker import targets
from loraf_serve.vllm.worker.store import CheckpointStore


class LinearOnlyModelManager(LRUCacheLoRAModelManager):
    """Puts LoRA layers on linear layers only.

    vLLM would put them on embeddings and the output head as well, where they cost memory (vocabulary × rank for each
    slot) and time in every step, for base rows too.
    """

    def _create_lora_modules(self) -> None:
        embeddings = self.model.embedding_modules
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in embeddings]
        super()._create_lora_modules()


class CheckpointLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's own manager with a store of checkpoints; a subclass says what is made of them.

    Args:
        cores: processors that loading may use.
    """

    _manager_cls = LinearOnlyModelManager

    def __init__(self, vllm_config: VllmConfig, *args, cores=(), **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self.store = CheckpointStore(self._opened, self._prepare, cores)

    def _opened(self, folder: str, tasks: Sequence[str]) -> AbstractContextManager[Described]:
        """See `CheckpointStore`."""
        raise NotImplementedError

    def _prepare(self, checkpoint: Described, pool: ThreadPoolExecutor) -> Any:
        """See `CheckpointStore`; what it makes has `nbytes`."""
        raise NotImplementedError

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """vLLM calls it at the beginning of every step."""
        self.store.step_back()
        super().set_active_adapters(requests, mapping)

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        return targets.layer_shapes(self._adapter_manager)

    def loaded(self, digest: str) -> int:
        """From now on the checkpoint may be named. Returns its bytes in this worker, slots not counted."""
        return self.store.get(digest).nbytes

    def drop(self, digest: str, lora_ids: list[int]) -> None:
        """Frees a checkpoint and what was made of its sets; no request of it may be running."""
        for lora_id in lora_ids:
            self.remove_adapter(lora_id)
        self.store.drop(digest)
