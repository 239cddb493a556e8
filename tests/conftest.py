"""Markers, the order of tests, how they share processes, and what the summary says of tools that are missing.

`make test` runs the tests in several processes (pytest-xdist). A file goes to one process, and so do all files that
share an engine of vLLM. Files that take long start first, so that no process is left waiting for one at the end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.tools import missing_tools

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton reads the variable when it is imported, and vLLM's processes must not see it. So import Triton first, then
    # remove the variable.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("loraf_serve.kernels.triton_ops")
    del os.environ["TRITON_INTERPRET"]

# Marked `engine`: files whose tests start vLLM engines.
ENGINE = (
    "tests/integration/",
    "tests/loraf_serve/http/test_engine_",
    "tests/loraf_serve/vllm/resident/test_life.py",
    "tests/loraf_serve/vllm/resident/test_ways.py",
    "tests/loraf_serve/vllm/stock/test_resident.py",
    "tests/loraf_serve/vllm/stock/test_server.py",
    "tests/loraf_serve/vllm/test_architectures.py",
    "tests/loraf_serve/vllm/test_backends.py",
    "tests/loraf_serve/vllm/test_campaigns.py",
    "tests/loraf_serve/vllm/test_engine_death.py",
    "tests/loraf_serve/vllm/test_hostile_requests.py",
    "tests/loraf_serve/vllm/test_parity.py",
    "tests/loraf_serve/vllm/test_processes.py",
    "tests/loraf_serve/vllm/test_request_fields.py",
)

# Marked `slow`: files with many tests that take seconds. Single slow tests carry the marker themselves.
SLOW = (
    "tests/benchmarks/",
    "tests/loraf_serve/adapters/test_loading_traffic.py",
    "tests/loraf_serve/http/test_lm_eval.py",
    "tests/loraf_serve/kernels/test_triton.py",
    "tests/loraf_train/compare/test_protocols.py",
    "tests/docs/test_peft_page.py",
    "tests/loraf_train/peft/test_processes.py",
    "tests/loraf_train/peft/test_trainers.py",
    "tests/loraf_train/processes/test_processes.py",
    "tests/loraf_train/sequence/test_resume_runs.py",
)

# The order in which files start: names of xdist groups or beginnings of paths. The rest follows.
FIRST = (
    "vllm-mistral",
    "tests/integration/",
    "vllm-llama",
    "tests/loraf_serve/vllm/resident/test_ways.py",
    "vllm-qwen2",
    "tests/loraf_serve/vllm/",
    "tests/loraf_serve/kernels/",
    "tests/loraf_train/processes/",
    "tests/loraf_train/compare/test_protocols.py",
    "tests/loraf_train/sequence/test_resume",
    "packaging",
    "tests/examples/",
)


def pytest_configure(config: pytest.Config) -> None:
    # xdist tells groups by a suffix of `_nodeid`. Without it, every process would start every engine.
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(f"pytest-xdist cannot group tests under pytest {pytest.__version__}: use pytest<9.2")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw") or not hasattr(os, "sched_getaffinity"):
        return
    # Otherwise vLLM binds the engines of all processes to the same core.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker[2:]) % len(cores)]))
    # Otherwise waiting OpenMP threads take the core from the other processes' tests.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.location[0]
        if file.startswith(ENGINE):
            item.add_marker(pytest.mark.engine)
        elif file.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(file))
    items.sort(key=_lateness)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)


def _lateness(item: pytest.Item) -> int:
    """When an item runs within its group: most first, then memory in the long run, then what uses up an engine.

    A worker touches the memory of its KV cache block by block, so that an engine that has just started grows for a
    while. After the other tests it does not. Whatever followed a test that uses up its engine would start it again.
    """
    if item.get_closest_marker("uses_up_engine") is not None:
        return 2
    return int(item.location[0] == "tests/loraf_serve/vllm/resident/test_life.py")


def _place(item: pytest.Item) -> int:
    """The item's index in FIRST, or its length."""
    group = item.get_closest_marker("xdist_group").args[0]
    return next((i for i, beginning in enumerate(FIRST) if group.startswith(beginning)), len(FIRST))


@pytest.fixture(autouse=True)
def _log_handlers_end_with_the_test() -> Iterator[None]:
    """`loraf-serve`, called in a test, sends the process's log to the standard error of that test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)]
    if lines := missing_tools(reasons):
        terminalreporter.section("Not run for lack of a tool")
        terminalreporter.line("\n".join(lines))
