"""`loraf-train eval`: scores the checkpoint of a tasks.yaml under the task sets that the command line names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loraf import manifest as manifests
from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf_train import set_options
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
    """Prints a row for each task, evaluation set and task set.

    Args:
        tasks, as_trained, base: the task sets, see `set_options.task_sets`. The base alone needs no checkpoint.
        limit: maximum number of examples of each evaluation set; None: all.
        json_file: where to write the same scores as JSON; None: nowhere.

    Raises:
        LorafError: mistakes in the file, a missing checkpoint or task, or no evaluation records.
    """
    if launcher.processes() > 1:
        raise ConfigError(Problem("eval runs in a single process", remedy="run it without a launcher"))
    prepared = prepare(path, overrides, limit)
    config = prepared.config
    scored = [task for task in config.tasks if prepared.data[task.name].evaluation]
    if not scored:
        message = "no task of the file has evaluation records"
        raise ConfigError(Problem(message, "tasks[0].data.eval", str(path), "name a file with evaluation records"))
    only_base = base and not tasks and not as_trained
    if only_base and prepared.existing is None:
        sets = [TaskSet()]
    else:
        manifest = prepared.existing or manifests.read(config.output)  # raises if there is no checkpoint
        sets = set_options.task_sets(manifest, tasks, as_trained, base)

    from loraf_train.scoring.evaluate import score
    from loraf_train.sequence import runner

    out = tables.console()
    for task in config.tasks:
        if task not in scored:
            out.print(f"{task.name}: has no evaluation records (data.eval), so it has no score")
    checkpoint = merger = None
    model, tokenizer, _ = runner.load_model(config)
    if prepared.existing is not None:
        from loraf.checkpoint import Checkpoint
        from loraf_train.adapter.merging import merger_of

        checkpoint = Checkpoint.open(config.output)
        merger = merger_of(model, checkpoint)
    scores = []
    with Progress(out) as progress:
        for task_set in sets:
            if merger is not None:
                merger.merge(task_set)
            for task in scored:
                report = progress.part(f"scoring {task.name} with {task_set}")
                scores += score(model, tokenizer, task, prepared.data[task.name], task_set, report)
    out.print(tables.score_table(scores, f"{config.output}" if checkpoint else config.model))
    if json_file is not None:
        content = {
            "file": str(path),
            "checkpoint": str(config.output) if checkpoint else None,
            "adapter_digest": checkpoint.manifest.adapter_digest if checkpoint else None,
            "model": config.model,
            **({"quantization": config.quantization} if config.quantization else {}),
            "scores": [{"task": s.task} | s.entry() for s in scores],
        }
        json_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        out.print(f"written: {json_file}")
    return 0
