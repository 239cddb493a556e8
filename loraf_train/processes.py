"""Several processes of one run (torchrun): one writes and reports, all of them end up with the same.

With a single process everything here is a plain call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")
_PATIENCE = timedelta(hours=2)  # how long others wait, for example while the first process scores a task


def join(device: torch.device) -> None:
    """Connects this process with the others, if it was started beside others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def first_writes(write: Callable[[], Result], read: Callable[[], Result]) -> Result:
    """`write()` in the first process; when it is done, `read()` in the others."""
    if is_first():
        result = write()
    wait()
    return result if is_first() else read()


def agree(number: int, device: torch.device) -> bool:
    """Whether all processes gave the same number (of 63 bits); all of them learn the answer.

    Args:
        device: what this process computes on.
    """
    if not distributed.is_initialized():
        return True
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(all_of_them, mine)
    return all(torch.equal(mine, other) for other in all_of_them)
