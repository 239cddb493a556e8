"""Exports a task set as a PEFT LoRA directory.

The scales of the set are folded into B and lora_alpha equals the rank, so that PEFT's factor lora_alpha / r is one.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import combined_b
from loraf.tasksets import TaskSet

PREFIX = "base_model.model."


def export_peft(
    checkpoint: Checkpoint,
    task_set: TaskSet,
    out: Path,
    dtype: torch.dtype = torch.float32,
    target_parameters: Collection[str] = (),
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into `out`, which is created if missing.

    Args:
        dtype: of both matrices. One narrower than float32 rounds them.
        target_parameters: weights (`<module>.weight`) that PEFT shall find by these names, not by the module's.
    """
    manifest = checkpoint.manifest
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {}
    for module in manifest.modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = checkpoint.projection_of(module).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = combined_b(checkpoint, module, task_set, wide).to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes the file readable by its owner only.
    (out / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base_model.name,
        "revision": manifest.base_model.revision,
        "inference_mode": True,
        "r": manifest.rank,
        "lora_alpha": manifest.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name for name in manifest.modules if f"{name}.weight" not in target_parameters),
    }
    if target_parameters:
        config["target_parameters"] = sorted(target_parameters)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
