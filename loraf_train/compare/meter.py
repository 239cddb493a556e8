"""Measures the wall time and the peak memory of a piece of work."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from loraf.system import trim_heap

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to the resident memory of this moment
_PEAK = "VmHWM:"


class Meter:
    """Measures the time between `start` and `stop`, and the peak memory in it.

    Args:
        device: where the model is. On a GPU, memory is what torch allocated there; on a CPU, what the process has
            resident, libraries included.
    """

    def __init__(self, device: torch.device):
        self._gpu = device if device.type == "cuda" else None
        self._has_peak = True

    def start(self) -> None:
        gc.collect()
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
            torch.cuda.reset_peak_memory_stats(self._gpu)
        else:
            trim_heap()  # freed memory that the heap keeps would hide what is allocated next
            self._has_peak = _reset_resident_peak()
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, int | None]:
        """Returns (seconds, bytes); None if this system does not report the peak."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        seconds = time.perf_counter() - self._began
        if self._gpu is not None:
            return seconds, torch.cuda.max_memory_allocated(self._gpu)
        return seconds, _resident_peak() if self._has_peak else None


def _reset_resident_peak() -> bool:
    """Returns whether it worked: only Linux can, and some containers may not."""
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(_PEAK)), None)
