"""`loraf-train inspect`: shows what a checkpoint holds, from its manifest; `--verify` reads and checks every byte.

Without `--verify` neither torch nor any other heavy library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf import manifest as manifests
from loraf.errors import CorruptCheckpoint, Problem
from loraf.four_bits import four_bit_note
from loraf.manifest import Manifest
from loraf.units import size_text
from loraf_train.set_options import as_trained_or_none
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 8  # maximum number of modules with a wrong projection that are named


def inspect(folder: Path, verify: bool, as_json: bool, layers: bool) -> int:
    """Prints the checkpoint in `folder`.

    Raises:
        LorafError: there is no checkpoint, or it is damaged; with `verify`, all damage is named.
    """
    manifest = manifests.read(folder)
    if verify:
        verify_all(folder, manifest)
    if as_json:
        print(json.dumps(facts(manifest) | {"verified": verify}, indent=1, ensure_ascii=False))
        return 0
    out = tables.console()
    base = manifest.base_model
    revision = f" at {base.revision}" if base.revision else ""
    out.print(f"{folder}: {len(manifest.tasks)} tasks for {base.name}{revision} ({base.architecture})")
    std = manifest.projection.init_std
    out.print(
        f"rank {manifest.rank}, {len(manifest.modules)} modules; A from seed {manifest.projection.seed} "
        f"({manifest.projection.generator}), standard deviation {std if std is not None else '1/√(3·d_in)'}"
    )
    if four_bit_note(manifest.tasks):
        out.print(four_bit_note(manifest.tasks))
    _print_tasks(out, manifest)
    _print_sparsity(out, manifest, layers)
    _print_scores(out, manifest)
    _print_named_sets(out, manifest)
    out.print(f"adapter digest      {manifest.adapter_digest}")
    out.print(f"projection digest   {manifest.projection.sha256}")
    out.print(f"base fingerprint    {base.fingerprint}")
    for task in manifest.tasks:
        for file in filter(None, (task.file, task.statistics)):
            out.print(f"{file.path}  {file.sha256}")
    out.print("verified: every file and every projection matches its digest" if verify else "not verified (--verify)")
    return 0


def verify_all(folder: Path, manifest: Manifest) -> None:
    """Reads every file, also those with statistics, and rebuilds every A.

    Raises:
        CorruptCheckpoint: everything that is damaged; of many modules with a wrong A, the first few.
        CheckpointError: another release of loraf wrote it.
    """
    from loraf.checkpoint import Checkpoint

    problems: list[Problem] = []
    try:
        Checkpoint.open(folder)
    except CorruptCheckpoint as error:
        problems += error.problems
    checkpoint = Checkpoint(folder, manifest, {})
    try:
        checkpoint.verify_statistics()
    except CorruptCheckpoint as error:
        problems += error.problems
    try:
        checkpoint.verify_projection()
    except CorruptCheckpoint as error:
        problems += error.problems[:SHOWN]
        more = len(error.problems) - SHOWN
        if more > 0:
            remedy = error.problems[0].remedy
            problems.append(Problem(f"A does not match in {more} more modules", "modules", str(folder), remedy))
    if problems:
        raise CorruptCheckpoint(problems)


def facts(manifest: Manifest) -> dict[str, Any]:
    """Everything that `inspect` shows, as plain data."""
    tasks = []
    for order, task in enumerate(manifest.tasks, 1):
        as_trained = as_trained_or_none(manifest, task.name)
        tasks.append(
            {
                "name": task.name,
                "order": order,
                "alpha": task.alpha,
                "sparsity": task.sparsity,
                "k": task.parameters,
                "dtype": task.dtype,
                "bytes": task.file.bytes,
                "sha256": task.file.sha256,
                "trained_with": list(task.trained_with),
                "as_trained": as_trained and str(as_trained),
                "templates": {"prompt": task.templates.prompt, "completion": task.templates.completion},
                "training": task.training,
                "scores": list(task.scores),
                "statistics": task.statistics and {"bytes": task.statistics.bytes, "sha256": task.statistics.sha256},
            }
        )
    return {
        "base_model": {
            "name": manifest.base_model.name,
            "revision": manifest.base_model.revision,
            "architecture": manifest.base_model.architecture,
            "fingerprint": manifest.base_model.fingerprint,
        },
        "rank": manifest.rank,
        "projection": {
            "generator": manifest.projection.generator,
            "seed": manifest.projection.seed,
            "init_std": manifest.projection.init_std,
            "sha256": manifest.projection.sha256,
        },
        "adapter_digest": manifest.adapter_digest,
        "tasks": tasks,
        "sets": manifest.sets,
        "capacity": {
            "positions": _total_positions(manifest),
            "free": sum(manifest.free_positions(name) for name in manifest.modules),
            "more_tasks": more_tasks(manifest),
        },
        "modules": {
            name: {
                "shape": [module.d_out, module.d_in],
                "free": manifest.free_positions(name),
                "sparsity": {t.name: 1 - t.k.get(name, 0) / (module.d_out * manifest.rank) for t in manifest.tasks},
            }
            for name, module in manifest.modules.items()
        },
    }


def more_tasks(manifest: Manifest) -> int | None:
    """How many more tasks as large as the last one fit; None if there is no task yet."""
    if not manifest.tasks:
        return None
    last = manifest.tasks[-1]
    return min(manifest.free_positions(name) // k for name, k in last.k.items())


def _total_positions(manifest: Manifest) -> int:
    return sum(module.d_out for module in manifest.modules.values()) * manifest.rank


def _print_tasks(out: Console, manifest: Manifest) -> None:
    columns = ["#", "task", "as trained", "alpha", "sparsity", "K", "dtype", "size", "statistics", "free after"]
    total = free = _total_positions(manifest)
    rows = []
    for order, task in enumerate(manifest.tasks, 1):
        free -= task.parameters
        rows.append(
            [
                order,
                task.name,
                str(as_trained_or_none(manifest, task.name) or tables.NONE),
                f"{task.alpha:g}",
                f"{task.sparsity:g}",
                f"{task.parameters:,}",
                task.dtype,
                size_text(task.file.bytes),
                size_text(task.statistics.bytes) if task.statistics else tables.NONE,
                f"{free / total:.1%}",
            ]
        )
    out.print(tables.table(columns, rows, left=3))
    out.print(capacity_text(manifest))


def capacity_text(manifest: Manifest) -> str:
    """Says how much of B is free, and how many more tasks fit."""
    free = sum(manifest.free_positions(name) for name in manifest.modules)
    more = more_tasks(manifest)
    fit = "" if more is None else f", {more} more tasks like {manifest.tasks[-1].name} fit"
    return f"capacity: {free:,} of {_total_positions(manifest):,} positions are free{fit}"


def _print_sparsity(out: Console, manifest: Manifest, layers: bool) -> None:
    """Prints a row for each kind of projection, or for each module."""
    groups: dict[str, list[str]] = {}
    for name in manifest.modules:
        groups.setdefault(name if layers else name.rsplit(".", 1)[-1], []).append(name)
    rows = []
    for group, names in groups.items():
        size = sum(manifest.modules[name].d_out for name in names) * manifest.rank
        free = sum(manifest.free_positions(name) for name in names)
        shapes = {(manifest.modules[name].d_out, manifest.modules[name].d_in) for name in names}
        shape = " ".join(f"{d_out}×{d_in}" for d_out, d_in in sorted(shapes))
        shares = [1 - sum(task.k.get(name, 0) for name in names) / size for task in manifest.tasks]
        rows.append([group, shape, len(names), *(f"{share:.4f}" for share in shares), f"{free / size:.1%}"])
    columns = ["module" if layers else "projection", "shape", "modules", *manifest.task_names, "free"]
    out.print(tables.table(columns, rows, "sparsity"))


def _print_scores(out: Console, manifest: Manifest) -> None:
    scored: list[tuple[str, Mapping[str, Any]]] = [(t.name, entry) for t in manifest.tasks for entry in t.scores]
    if not scored:
        out.print("no scores are stored")
        return
    columns = ["task set", "task", "evaluation", "metric", "score", "examples"]
    rows = []
    for name, entry in scored:
        score = tables.score_text(entry["score"], entry["metric"])
        rows.append([entry["set"], name, entry["evaluation"], entry["metric"], score, entry["count"]])
    out.print(tables.table(columns, rows, "scores", left=4))


def _print_named_sets(out: Console, manifest: Manifest) -> None:
    if manifest.sets:
        rows = [[name, str(manifest.named_set(name))] for name in manifest.sets]
        out.print(tables.table(["name", "task set"], rows, "named sets", left=2))
