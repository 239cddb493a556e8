"""`loraf-train export`: a task set as a PEFT LoRA directory, or as a full model with the set merged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loraf import manifest
from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf_train import task_sets
from loraf_train.terminal import tables


def export(
    folder: Path,
    out: Path,
    form: str,
    tasks: str | None = None,
    as_trained: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> int:
    """Writes `out`, whole or not at all.

    Args:
        form: "peft" or "merged".
        tasks, as_trained: the set, one of them.
        model: instead of the checkpoint's base model.
        dtype: of the written tensors; None: float32 for PEFT, the base's own for a merged model.

    Raises:
        LorafError: `out` is not empty, there is no such set, the checkpoint is damaged or belongs to another base.
    """
    problems = _refusals(out)
    described = manifest.read(folder)
    chosen = described.as_trained(as_trained) if as_trained else task_sets.task_set(tasks or "all", described)
    if problems:
        raise ConfigError(problems)

    from loraf import base_model
    from loraf.checkpoint import Checkpoint

    tables.quiet_libraries()
    checkpoint = Checkpoint.open(folder, chosen.names)
    source = None
    if form == "merged" or model is not None:
        name = model or described.base_model.name
        revision = described.base_model.revision if model is None else None
        source = base_model.resolve(name, revision, field="--model")
        if not allow_other_base:
            base_model.require_same_base(described.base_model, source, folder)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        if form == "peft":
            _peft(checkpoint, chosen, partial, dtype)
        else:
            _merged(checkpoint, chosen, source, partial, dtype)
        os.rename(partial, out)  # over an empty folder, or to where nothing is
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = tables.size_text(sum(file.stat().st_size for file in out.iterdir()))
    tables.console().print(f"{out}: task set {chosen} as {form}, {size}")
    return 0


def _refusals(out: Path) -> list[Problem]:
    if out.is_dir() and any(out.iterdir()):
        return [Problem(f"{out} is not empty", "--out", remedy="name an empty folder or a new one")]
    if out.exists() and not out.is_dir():
        return [Problem(f"{out} is no folder", "--out", remedy="name an empty folder or a new one")]
    ancestor = next(p for p in out.absolute().parents if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        return [Problem(f"{ancestor} cannot be written", "--out", remedy="name a folder of yours")]
    return []


def _peft(checkpoint, chosen: TaskSet, out: Path, dtype: str | None) -> None:
    import torch

    from loraf.peft_export import export_peft

    export_peft(checkpoint, chosen, out, getattr(torch, dtype or "float32"))


def _merged(checkpoint, chosen: TaskSet, source: Path, out: Path, dtype: str | None) -> None:
    """The sum is taken in float32 from the base's own numbers and rounded once."""
    import torch
    from transformers import AutoModelForCausalLM

    from loraf.delta import Merger
    from loraf_train.sequence.preflight import load_tokenizer

    tokenizer = load_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    wanted = model.dtype if dtype is None else getattr(torch, dtype)
    if wanted == torch.float32:
        model.float()
    Merger(model, checkpoint, keep_projections=False).merge(chosen)
    model.to(wanted)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
