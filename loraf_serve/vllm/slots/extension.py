"""The worker extension of the slots backend; importing it installs the backend, see
`loraf_serve.vllm.worker.extension`."""

from __future__ import annotations

from loraf_serve.vllm.slots.manager import SlotsLoRAManager
from loraf_serve.vllm.slots.punica_cpu import GroupedPunicaWrapperCPU
from loraf_serve.vllm.worker.extension import install
from loraf_serve.vllm.worker.remote import RemoteCalls


class WorkerExtension(RemoteCalls):
    manager_class = SlotsLoRAManager


install(SlotsLoRAManager, GroupedPunicaWrapperCPU)
