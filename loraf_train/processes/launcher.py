"""What `accelerate launch` requests through the environment: supported, or refused before anything is trained.

Supported are several processes and FSDP version 2 (adapter.sharding). Everything else that would change what is
computed, or where it is stored, is refused, since accelerate would apply it without the checkpoint recording it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraf.errors import Problem

_FSDP = "ACCELERATE_USE_FSDP"
_SOURCE = "accelerate launch"  # in the place of a file in messages


@dataclass(frozen=True)
class Sharding:
    """Options of FSDP version 2.

    Attributes:
        reshard_after_forward: free a layer's gathered weights after its forward pass, and gather them again in the
            backward pass.
    """

    reshard_after_forward: bool


def processes() -> int:
    """Returns how many processes the launcher started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the first process, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def sharding() -> Sharding | None:
    """Returns the requested sharding; None: every process holds the whole base, as a single process always does."""
    if not _on(_FSDP) or processes() == 1:
        return None
    return Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "0", "no"))


def problems() -> list[Problem]:
    """Reports everything that the launcher requests and that is not supported."""
    problems = []

    def refuse(message: str, field: str, remedy: str) -> None:
        problems.append(Problem(message, field, _SOURCE, remedy))

    for variable, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _on(f"ACCELERATE_USE_{variable}"):
            remedy = "launch with --multi_gpu, or with --use_fsdp --fsdp_version 2 if the model does not fit on one GPU"
            refuse(f"{name} is not supported", f"--use_{variable.lower()}", remedy)
    if _on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        remedy = "leave it out; processes share the batch, and with FSDP version 2 the base model"
        refuse("tensor, context and hybrid parallelism are not supported", "--use_parallelism_config", remedy)
    if _on(_FSDP):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            remedy = "set fsdp_version: 2 (--fsdp_version 2)"
            refuse(f"FSDP version {version} is not supported", "fsdp_version", remedy)
        if _on("FSDP_OFFLOAD_PARAMS"):
            remedy = "set it to false; use more processes, or training.gradient_checkpointing, to save memory"
            refuse("offloading weights to the CPU is not supported", "fsdp_offload_params", remedy)
        if _on("FSDP_ACTIVATION_CHECKPOINTING"):
            remedy = "set it to false, and training.gradient_checkpointing: true in tasks.yaml"
            refuse("is not supported", "fsdp_activation_checkpointing", remedy)
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed != "no":
        remedy = "set it to no, and set precision: in tasks.yaml, which the checkpoint records"
        refuse(f"{mixed} is not supported", "mixed_precision", remedy)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        refuse(f"{backend} is not supported", "dynamo_backend", "set it to no")
    return problems


@contextmanager
def plain_data_parallel() -> Iterator[None]:
    """Hides FSDP from accelerate in a `with` block: the base is sharded already, and the values must not be."""
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
