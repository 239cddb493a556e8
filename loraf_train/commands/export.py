"""`loraf-train export`: writes a task set as a PEFT LoRA directory, or as a full model with the set merged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest as manifests
from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf.units import size_text
from loraf_train import set_options
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from loraf.checkpoint import Checkpoint


def export(
    folder: Path,
    out: Path,
    file_format: str,
    tasks: str | None = None,
    as_trained: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> int:
    """Writes `out` as a whole, or not at all.

    Args:
        file_format: "peft" or "merged".
        tasks, as_trained: the task set; give one of the two.
        model: the base model; None: the one that the checkpoint names.
        dtype: of the written tensors; None: float32 for PEFT, the base's own for a merged model.

    Raises:
        LorafError: `out` is not empty, there is no such set, the checkpoint is damaged or belongs to another base.
    """
    problems = _output_problems(out)
    manifest = manifests.read(folder)
    task_set = manifest.as_trained(as_trained) if as_trained else set_options.task_set(tasks or "all", manifest)
    if problems:
        raise ConfigError(problems)

    from loraf import base_model
    from loraf.checkpoint import Checkpoint

    tables.quiet_libraries()
    checkpoint = Checkpoint.open(folder, task_set.names)
    base_folder = None
    if file_format == "merged" or model is not None:
        name = model or manifest.base_model.name
        revision = manifest.base_model.revision if model is None else None
        base_folder = base_model.resolve(name, revision, field="--model")
        if not allow_other_base:
            base_model.require_same_base(manifest.base_model, base_folder, folder)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        if file_format == "peft":
            _write_peft(checkpoint, task_set, partial, dtype)
        else:
            assert base_folder is not None  # resolved above
            _write_merged(checkpoint, task_set, base_folder, partial, dtype)
        os.rename(partial, out)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = size_text(sum(file.stat().st_size for file in out.iterdir()))
    tables.console().print(f"{out}: task set {task_set} as {file_format}, {size}")
    return 0


def _output_problems(out: Path) -> list[Problem]:
    if out.is_dir() and any(out.iterdir()):
        return [Problem(f"{out} is not empty", "--out", remedy="name an empty folder or a new one")]
    if out.exists() and not out.is_dir():
        return [Problem(f"{out} is not a folder", "--out", remedy="name an empty folder or a new one")]
    ancestor = next(p for p in out.absolute().parents if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        return [Problem(f"{ancestor} cannot be written", "--out", remedy="name a folder that you may write to")]
    return []


def _write_peft(checkpoint: Checkpoint, task_set: TaskSet, out: Path, dtype: str | None) -> None:
    import torch

    from loraf.peft_export import export_peft

    export_peft(checkpoint, task_set, out, getattr(torch, dtype or "float32"))


def _write_merged(checkpoint: Checkpoint, task_set: TaskSet, base_folder: Path, out: Path, dtype: str | None) -> None:
    """Sums in float32, from the base's own numbers, and rounds once."""
    import torch
    from transformers import AutoModelForCausalLM

    from loraf.delta import Merger
    from loraf_train.sequence.preflight import load_tokenizer

    tokenizer = load_tokenizer(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype="auto")
    module: torch.nn.Module = model  # transformers wraps `float` and `to` without types
    written_dtype: torch.dtype = model.dtype if dtype is None else getattr(torch, dtype)
    if written_dtype == torch.float32:
        module.float()
    Merger(model, checkpoint, keep_projections=False).merge(task_set)
    module.to(written_dtype)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
