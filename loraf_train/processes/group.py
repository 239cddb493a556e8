"""Several processes of one run (accelerate launch, torchrun): one writes and reports, all end up with the same.

With a single process everything here is a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from loraf_train.processes import launcher

Result = TypeVar("Result")
_PATIENCE = timedelta(hours=2)  # how long others wait, for example while the first process scores a task


def join(device: torch.device) -> None:
    """Connects this process with the others, if it was started beside others."""
    if launcher.processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)


def leave() -> None:
    """The end of a run of several processes: waits for all of them."""
    if distributed.is_initialized():
        wait()
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Known before `join`, too."""
    return distributed.get_rank() == 0 if distributed.is_initialized() else launcher.is_first()


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
