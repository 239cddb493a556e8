"""Wall time and most memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to what is resident now
_PEAK = "VmHWM:"


class Meter:
    """Between `start` and `stop`.

    Args:
        device: where the model is. On a GPU memory is what torch allocated there, on a CPU what the process has
            resident, libraries and all.
    """

    def __init__(self, device: torch.device):
        self._gpu = device if device.type == "cuda" else None
        self._can_tell = True

    def start(self) -> None:
        gc.collect()
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
            torch.cuda.reset_peak_memory_stats(self._gpu)
        else:
            _give_back_freed_memory()
            self._can_tell = _reset_resident_peak()
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, int | None]:
        """(seconds, bytes); None: this system does not tell."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        seconds = time.perf_counter() - self._began
        if self._gpu is not None:
            return seconds, torch.cuda.max_memory_allocated(self._gpu)
        return seconds, _resident_peak() if self._can_tell else None


def _reset_resident_peak() -> bool:
    """Whether it could be done: only Linux can, and not every container may."""
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


def _give_back_freed_memory() -> None:
    """What the C library keeps for later would count as resident, and hide what comes next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
