"""Shared by the benchmarks: confidence intervals, memory use, and the environment of a measurement."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns the median and its 95 % bootstrap interval."""
    drawn = random.Random(seed)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[50], "high": medians[1949], "n": len(values)}


def memory(field: str) -> int:
    """Returns the memory of this process in bytes: VmRSS is the current one, VmHWM the peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def commit() -> str:
    """Returns the commit of the working tree, marked if it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def processor() -> str:
    """Returns the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Returns the instruction sets that the kernels have variants for and this processor supports."""
    flags = _cpuinfo("flags").split()
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def _cpuinfo(field: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def machine() -> dict[str, object]:
    """Describes the machine, without host names."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": instructions(),
        "load before": os.getloadavg()[0],
    }
