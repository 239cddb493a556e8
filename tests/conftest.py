"""How `make test` shares the tests out among several processes (pytest-xdist): a file goes to one of them, or what
shares an engine of vLLM. The slow ones come first, so that none is left over at the end. Without `-n` all this is
nothing."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton reads it as it is imported, and vLLM's processes must not find it: so this comes first, and is undone.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("loraf_serve.kernels.triton_ops")
    del os.environ["TRITON_INTERPRET"]

# In this order; a name of a group, or the beginning of a file's.
SLOW = (
    "vllm-mistral",
    "tests/integration",
    "vllm-llama",
    "tests/loraf_serve/vllm/resident/test_ways.py",
    "vllm-qwen2",
    "tests/loraf_serve/vllm",
    "tests/loraf_serve/kernels",
    "tests/loraf_train/processes/test_processes.py",
    "tests/loraf_train/compare/test_protocols.py",
    "tests/loraf_train/sequence/test_resume",
    "tests/examples",
)


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw") or not hasattr(os, "sched_getaffinity"):
        return
    # vLLM would bind the engines of all to one and the same processor.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker[2:]) % len(cores)]))
    # A thread of OpenMP that waits would take the processor from the others' tests.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group").args[0]
        return next((i for i, slow in enumerate(SLOW) if group.startswith(slow)), len(SLOW))

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=place)
