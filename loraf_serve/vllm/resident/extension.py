"""The worker extension of the resident backend; importing it installs the backend, see
`loraf_serve.vllm.worker.extension`."""

from __future__ import annotations

from loraf_serve.vllm.resident.manager import ResidentLoRAManager
from loraf_serve.vllm.worker.extension import install
from loraf_serve.vllm.worker.remote import RemoteCalls


class WorkerExtension(RemoteCalls):
    manager_class = ResidentLoRAManager


install(ResidentLoRAManager)
