"""`loraf-train run`: trains the tasks that the checkpoint lacks, and prints progress and the table of scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.files.folder_lock import locked
from loraf_train.processes import launcher
from loraf_train.scoring import table
from loraf_train.sequence.preflight import PreparedRun, prepare
from loraf_train.set_options import as_trained_or_none
from loraf_train.terminal import tables
from loraf_train.terminal.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from loraf.manifest import Manifest
    from loraf_train.scoring.evaluate import Score


def run(path: Path, overrides: Sequence[str], evaluate: bool, eval_limit: int | None) -> int:
    """Trains and scores. Of several processes only the first prints.

    Args:
        evaluate: whether to measure the scores that the table lacks.
        eval_limit: maximum number of examples of each evaluation set; None: all.

    Raises:
        LorafError: every mistake in the file, the model, the records or the output folder, before training starts; or
            another process writes to the output folder.
    """
    prepared = prepare(path, overrides, eval_limit)
    if not launcher.is_first():
        return _run(prepared, evaluate)
    with locked(prepared.config.output, "loraf-train run"):
        return _run(prepared, evaluate)


def _run(prepared: PreparedRun, evaluate: bool) -> int:
    config, out = prepared.config, tables.console(quiet=not launcher.is_first())
    out.print(f"{config.file}: {len(config.tasks)} tasks on {config.model} into {config.output}")
    existing = prepared.existing.task_names if prepared.existing else ()
    trained = [task.name for task in config.tasks if task.name in existing]
    if trained:
        out.print(f"trained already: {', '.join(trained)}")
    out.print(f"to train: {', '.join(prepared.waiting) or 'nothing'}")
    for warning in prepared.warnings:
        out.print(f"warning: {warning}")
    for task in config.tasks:
        if evaluate and not prepared.data[task.name].evaluation:
            out.print(f"{task.name} has no evaluation records (data.eval), so it gets no score")
    for name in table.outdated(prepared.existing, config.tasks, prepared.data) if prepared.existing else ():
        reason = "were measured on other records or in another way, or an earlier release of loraf stored them"
        consequence = "they are measured again" if evaluate else "they are out of date"
        out.print(f"{name}: its stored scores {reason}; {consequence}")
    if prepared.existing and not prepared.waiting:
        lacking = table.missing(prepared.existing, config.tasks, prepared.data) if evaluate else []
        if not lacking:  # nothing left that needs the model
            from loraf_train.sequence.resume import tidy

            if launcher.is_first():
                tidy(config.output, prepared.existing.task_names)
            print_summary(out, prepared.existing)
            return 0

    from loraf_train.adapter import sharding
    from loraf_train.commands.run_progress import RunProgress
    from loraf_train.processes import group
    from loraf_train.sequence import runner

    loaded = runner.load_model(config)
    with Progress(out) as progress:
        observer = RunProgress(prepared, out, progress, evaluate)
        checkpoint = runner.run(config, prepared.data, observer, loaded, base_text=prepared.base_text)
        # scores that an earlier, interrupted run did not measure
        if evaluate and (group.is_first() or sharding.is_sharded(loaded[0])):
            observer.score(checkpoint, loaded[0])
    print_summary(out, checkpoint.manifest)
    group.leave()
    return 0


def print_summary(out: Console, manifest: Manifest) -> None:
    """Prints the table R[i, j], each task's score as trained, and the sequence in three numbers."""
    stored = table.stored(manifest)
    if not stored:
        out.print("no scores are stored")
        return
    headlines = table.headlines(stored)
    names = [name for name in manifest.task_names if any(task == name for _, task in headlines)]
    metrics = {score.task: score.metric for score in stored}
    rows = []
    for finished, task_set in table.rows(manifest):
        cells = [headlines.get((str(task_set), name)) for name in names]
        rows.append([f"after {finished}", str(task_set), *map(_cell, cells)])
    for name in names:
        as_trained = str(as_trained_or_none(manifest, name) or tables.NONE)
        scores = ("" if n != name else _cell(headlines.get((as_trained, n))) for n in names)
        rows.append([f"{name} as trained", as_trained, *scores])
    columns = ["", "task set", *(f"{name} ({metrics[name]})" for name in names)]
    out.print(tables.table(columns, rows, "score of each task under each task set (in brackets: examples)", left=2))
    summary = table.summary(manifest, stored)
    if summary:
        first = len(manifest.tasks) - 1
        over = f"mean over the first {first} of {first + 1} tasks" if first > 1 else f"of {manifest.task_names[0]}"
        out.print(
            f"average of the last row {summary.average:.3f}; backward transfer {summary.backward_transfer:+.3f} and "
            f"forgetting {summary.forgetting:.3f} ({over}, all tasks on)"
        )


def _cell(score: Score | None) -> str:
    return tables.NONE if score is None else f"{tables.score_text(score.score, score.metric)} ({score.count})"
