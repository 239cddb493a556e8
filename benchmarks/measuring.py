"""What measurements share: an interval for a median, and what the numbers depend on."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median, and its bootstrap interval of 95 %."""
    drawn = random.Random(seed)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[50], "high": medians[1949], "n": len(values)}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def machine() -> dict[str, object]:
    """What the numbers depend on, without names."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": named or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in wanted if flag in flags],
        "load before": os.getloadavg()[0],
    }
