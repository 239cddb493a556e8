"""`loraf-train eval`: scores the checkpoint of a tasks.yaml under the task sets that are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loraf import manifest as manifests
from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf_train import task_sets
from loraf_train.processes import launcher
from loraf_train.sequence.preflight import prepare
from loraf_train.terminal import tables
from loraf_train.terminal.progress import Progress


def evaluate(
    path: Path,
    overrides: Sequence[str],
    tasks: Sequence[str],
    as_trained: Sequence[str],
    base: bool,
    limit: int | None,
    json_file: Path | None,
) -> int:
    """Prints a row for each task, evaluation set and task set; writes the same as JSON if asked.

    Args:
        tasks, as_trained, base: the task sets, see `selection.task_sets`. The base alone needs no checkpoint.
        limit: examples of each evaluation set at most.

    Raises:
        LorafError: mistakes of the file, no checkpoint, no such task, nothing to score with.
    """
    if launcher.processes() > 1:
        raise ConfigError(Problem("eval runs in one process", remedy="run it without a launcher"))
    prepared = prepare(path, overrides, limit)
    config = prepared.config
    scored = [task for task in config.tasks if prepared.data[task.name].evaluation]
    if not scored:
        message = "no task of the file has evaluation records"
        raise ConfigError(Problem(message, "tasks[0].data.eval", str(path), "name a file of them"))
    only_base = base and not tasks and not as_trained
    checkpoint = None
    if only_base and prepared.existing is None:
        sets = [TaskSet()]
    else:
        manifest = prepared.existing or manifests.read(config.output)  # which says that there is none
        sets = task_sets.task_sets(manifest, tasks, as_trained, base)

    from loraf_train.scoring import evaluate
    from loraf_train.sequence import runner

    out = tables.console()
    for task in config.tasks:
        if task not in scored:
            out.print(f"{task.name}: has no evaluation records (data.eval), so it has no score")
    merger = None
    model, tokenizer, _ = runner.load_model(config)
    if prepared.existing is not None:
        from loraf.checkpoint import Checkpoint
        from loraf.delta import Merger

        checkpoint = Checkpoint.open(config.output)
        merger = Merger(model, checkpoint)
    scores = []
    with Progress(out) as progress:
        for task_set in sets:
            if merger is not None:
                merger.merge(task_set)
            for task in scored:
                step = progress.part(f"scoring {task.name} with {task_set}")
                data = prepared.data[task.name]
                scores += evaluate.score(model, tokenizer, task, data.evaluation, task_set, step)
    digest = checkpoint.manifest.adapter_digest if checkpoint else None
    out.print(tables.score_table(scores, f"{config.output}" if checkpoint else config.model))
    if json_file is not None:
        content = {
            "file": str(path),
            "checkpoint": str(config.output) if checkpoint else None,
            "adapter_digest": digest,
            "model": config.model,
            "scores": [{"task": s.task} | s.entry() for s in scores],
        }
        json_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        out.print(f"written: {json_file}")
    return 0
