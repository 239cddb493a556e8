"""Several processes of one run (accelerate launch, torchrun): one writes and reports, all end with the same state.

In a single process these are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from loraf_train.processes import launcher

Result = TypeVar("Result")
_TIMEOUT = timedelta(hours=2)  # of waiting for other processes, for example while the first one scores a task


def join(device: torch.device) -> None:
    """Connects this process to the others. No-op in a single process."""
    if launcher.processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT)


def leave() -> None:
    """Waits for all processes and disconnects. No-op in a single process."""
    if distributed.is_initialized():
        wait()
        distributed.destroy_process_group()


def count() -> int:
    """Returns the number of connected processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first process; works before `join` too."""
    return distributed.get_rank() == 0 if distributed.is_initialized() else launcher.is_first()


def wait() -> None:
    """Waits until all processes have called it."""
    if distributed.is_initialized():
        distributed.barrier()


def first_writes(write: Callable[[], Result], read: Callable[[], Result]) -> Result:
    """Returns `write()` in the first process; in the others `read()`, called after the first has finished."""
    if is_first():
        result = write()
    wait()
    return result if is_first() else read()


def agree(number: int, device: torch.device) -> bool:
    """Returns, in all processes, whether they all passed the same number (of up to 63 bits).

    Args:
        device: the one this process computes on.
    """
    if not distributed.is_initialized():
        return True
    own = torch.tensor([number], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(count())]
    distributed.all_gather(gathered, own)
    return all(torch.equal(own, other) for other in gathered)


def of_first(number: float, device: torch.device) -> float:
    """Returns, in all processes, the number that the first one passed.

    Args:
        device: the one this process computes on.
    """
    if not distributed.is_initialized():
        return number
    own = torch.tensor([number], dtype=torch.float64, device=device)
    distributed.broadcast(own, src=0)
    return float(own)
