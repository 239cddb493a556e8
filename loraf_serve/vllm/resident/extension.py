"""What an engine of the resident backend adds to vLLM's worker class; see `loraf_serve.vllm.slots.extension`."""

from __future__ import annotations

import functools

import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin

from loraf_serve.vllm.resident.manager import ResidentLoRAManager
from loraf_serve.vllm.worker import waiting
from loraf_serve.vllm.worker.remote import CORES, RemoteCalls


class WorkerExtension(RemoteCalls):
    manager_class = ResidentLoRAManager


waiting.install()
lora_model_runner_mixin.LRUCacheWorkerLoRAManager = functools.partial(ResidentLoRAManager, cores=CORES)
