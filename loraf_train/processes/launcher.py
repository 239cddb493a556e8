"""What `accelerate launch` asks for through the environment: taken, or refused before anything is trained.

Taken: the processes, and FSDP version 2 (adapter.sharding). Everything else that would change what is computed or
where it is kept is refused, since accelerate would do it behind the back of what the checkpoint records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraf.errors import Problem

_FSDP = "ACCELERATE_USE_FSDP"
_WHERE = "accelerate launch"


@dataclass(frozen=True)
class Sharding:
    """FSDP version 2 is asked for.

    Attributes:
        reshard_after_forward: a layer's whole weights are given up after its forward pass, and gathered again in the
            backward pass.
    """

    reshard_after_forward: bool


def processes() -> int:
    """How many processes the launcher started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def sharding() -> Sharding | None:
    """None: every process holds the whole base; one process alone always does."""
    if not _on(_FSDP) or processes() == 1:
        return None
    return Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "0", "no"))


def problems() -> list[Problem]:
    """Everything that the launcher asks for and that is not to be had here."""
    found = []

    def refuse(message: str, field: str, remedy: str) -> None:
        found.append(Problem(message, field, _WHERE, remedy))

    for variable, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _on(f"ACCELERATE_USE_{variable}"):
            remedy = "launch with --multi_gpu, or with --use_fsdp --fsdp_version 2 where a GPU cannot hold the base"
            refuse(f"{name} is not supported", f"--use_{variable.lower()}", remedy)
    if _on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        remedy = "leave it out; processes divide the batch, and with FSDP version 2 the base"
        refuse("tensor, context and hybrid parallelism are not supported", "--use_parallelism_config", remedy)
    if _on(_FSDP):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            remedy = "set fsdp_version: 2 (--fsdp_version 2)"
            refuse(f"FSDP version {version} is not supported", "fsdp_version", remedy)
        if _on("FSDP_OFFLOAD_PARAMS"):
            remedy = "set it to false; use more processes, or training.gradient_checkpointing, to save memory"
            refuse("weights cannot be kept on the CPU", "fsdp_offload_params", remedy)
        if _on("FSDP_ACTIVATION_CHECKPOINTING"):
            remedy = "set it to false, and training.gradient_checkpointing: true in tasks.yaml"
            refuse("is not obeyed here", "fsdp_activation_checkpointing", remedy)
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed != "no":
        remedy = "set it to no, and precision: in tasks.yaml, which the checkpoint records"
        refuse(f"{mixed} is not obeyed here", "mixed_precision", remedy)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        refuse(f"{backend} is not obeyed here", "dynamo_backend", "set it to no")
    return found


@contextmanager
def plain_data_parallel() -> Iterator[None]:
    """Within, accelerate sees processes and no FSDP: the base is sharded already, and the values are not to be."""
    before = os.environ.get(_FSDP)
    os.environ[_FSDP] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FSDP]
        else:
            os.environ[_FSDP] = before


def _on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "on")
