"""`loraf-train export`: writes a task set as a PEFT LoRA directory, or as a full model with the set merged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loraf import manifest as manifests
from loraf import set_text
from loraf.errors import ConfigError, Problem
from loraf.four_bits import four_bit_note
from loraf.units import size_text
from loraf_train.terminal import tables


def export(
    folder: Path,
    out: Path,
    file_format: str,
    tasks: str | None = None,
    as_trained: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> int:
    """Writes `out` as a whole, or not at all.

    Args:
        file_format: "peft" or "merged".
        tasks, as_trained: the task set; give one of the two.
        model: the base model; None: the one that the checkpoint names.
        dtype: of the written tensors; None: float32 for PEFT, the base's own for a merged model.
        revision: of the base model on the hub; None: the one that the checkpoint names, or the main branch of `model`.

    Raises:
        LorafError: `out` is not empty; there is no such set; the checkpoint is damaged or belongs to another base; the
            base model cannot be merged or written; PEFT would not apply the adapter.
    """
    problems = _output_problems(out)
    manifest = manifests.read(folder)
    task_set = manifest.as_trained(as_trained) if as_trained else set_text.task_set(tasks or "all", manifest)
    note = four_bit_note(manifest.task(name) for name in task_set.names)
    if note and file_format == "merged":
        message = f"{note}. A merged model has plain weights, so it would not be what was trained"
        problems.append(Problem(message, "--format", remedy="use --format peft, and load the base in four bits"))
    if problems:
        raise ConfigError(problems)

    import torch

    from loraf import base_model
    from loraf.checkpoint import Checkpoint
    from loraf_train.commands.export_merged import write_merged
    from loraf_train.commands.export_peft import write_peft

    tables.quiet_libraries()
    checkpoint = Checkpoint.open(folder, task_set.names)
    base_folder = None
    if file_format == "merged" or model is not None or revision is not None:
        name = model or manifest.base_model.name
        if revision is not None:
            base_model.require_revision(name, revision, "--revision")
        elif model is None:
            revision = manifest.base_model.revision
        base_folder = base_model.resolve(name, revision, field="--model")
        actual = base_model.describe(name, base_folder)
        if not allow_other_base:
            base_model.require_same_base(manifest.base_model, base_folder, folder, actual)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        unchecked = None
        if file_format == "peft":
            unchecked = write_peft(checkpoint, task_set, base_folder, partial, getattr(torch, dtype or "float32"))
        else:
            assert base_folder is not None  # resolved above
            write_merged(checkpoint, task_set, base_folder, partial, getattr(torch, dtype) if dtype else None)
        os.rename(partial, out)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = size_text(sum(file.stat().st_size for file in out.iterdir()))
    console = tables.console()
    console.print(f"{out}: task set {task_set} as {file_format}, {size}")
    if note:
        console.print(note)
    if unchecked:
        console.print(f"not checked whether PEFT applies it to every module: {unchecked}")
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
