"""`loraf-train protect`: gathers the statistics of finished tasks from their training data.

For tasks that were trained without retention, or before there was any, and for those whose statistics were left out
when the checkpoint was pushed. Later tasks then protect what these answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest as manifests
from loraf.errors import ConfigError, CorruptCheckpoint, Problem, one_line
from loraf.files.folder_lock import locked
from loraf.units import size_text
from loraf_train.processes import launcher
from loraf_train.sequence.preflight import PreparedRun, survey
from loraf_train.sequence.provenance import EXAMPLES_DIGEST
from loraf_train.settings.loading import draft
from loraf_train.terminal import tables
from loraf_train.terminal.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from loraf.checkpoint import Checkpoint


def protect(folder: Path, path: Path, overrides: Sequence[str], again: bool) -> int:
    """Gathers and stores the statistics of the file's finished tasks that have none, or damaged ones.

    Args:
        folder: the checkpoint, in place of the file's `output`.
        path: the tasks.yaml, which says what the tasks were trained on.
        again: whether to gather those of tasks that have some, too.

    Raises:
        LorafError: a mistake in the file, no finished task in it, training examples other than those that a task was
            trained on; or another process writes to the checkpoint.
    """
    if launcher.processes() > 1:
        raise ConfigError(Problem("protect runs in a single process", remedy="run it without a launcher"))
    manifests.read(folder)
    with locked(folder, "loraf-train protect"):
        output = f"output={json.dumps(str(folder.absolute()), ensure_ascii=False)}"
        _, problems = draft(path, [*overrides, output])  # what is wrong with `retention` is a mistake all the same
        # No task is trained here, and damaged statistics are what this command mends.
        prepared, more, _ = survey(path, [*overrides, output, "retention=off"])
        problems += [problem for problem in more if problem not in problems]
        if problems or prepared is None:
            raise ConfigError(problems)
        from loraf.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(prepared.config.output)
        finished = [task.name for task in prepared.config.tasks if task.name in checkpoint.manifest.task_names]
        lacking = [name for name in finished if again or _lacks_statistics(checkpoint, name)]
        problems = _problems(prepared, lacking)
        if problems:
            raise ConfigError(problems)
        _protect(prepared, checkpoint, lacking, tables.console())
    return 0


def _problems(prepared: PreparedRun, lacking: Sequence[str]) -> list[Problem]:
    """What keeps the statistics of these tasks from being gathered."""
    config, existing = prepared.config, prepared.existing
    assert existing is not None
    problems = []
    for i, task in enumerate(config.tasks):
        if task.name not in lacking:
            continue
        before = existing.task_names[: existing.task_names.index(task.name)]  # one trained again comes later
        missing = [name for name in existing.task(task.name).trained_with if name not in before]
        if missing:
            again = ", ".join(name for name in missing if name in existing.task_names)
            message = (
                f"task {task.name!r} was trained on top of {', '.join(missing)}, which this checkpoint does not have"
                + (f" as it was then ({again}: trained again since)" if again else "")
            )
            remedy = "leave the task out of the file; what it answered when it was trained is lost"
            problems.append(Problem(message, f"tasks[{i}]", str(config.file), remedy))
        trained_on = existing.task(task.name).training.get(EXAMPLES_DIGEST)
        if trained_on is not None and trained_on != prepared.data[task.name].digest:
            message = f"task {task.name!r} was trained on other examples than these"
            remedy = "name the records that it was trained on, or leave the task out of the file"
            problems.append(Problem(message, f"tasks[{i}].data.train", str(config.file), remedy))
    if all(task.name not in existing.task_names for task in config.tasks):
        message = "none of its tasks is in the checkpoint"
        remedy = f"name the file that trained {', '.join(existing.task_names) or 'it'}"
        problems.append(Problem(message, "tasks", str(config.file), remedy))
    return problems


def _protect(prepared: PreparedRun, checkpoint: Checkpoint, lacking: Sequence[str], out: Console) -> None:
    from loraf_train.adapter import model_limits
    from loraf_train.adapter.trainable_base import TrainableBase, find_targets, projections
    from loraf_train.retention.of_checkpoint import gather_again
    from loraf_train.sequence.phases import TRAINING_SEED, seeds_of
    from loraf_train.sequence.runner import load_model

    config = prepared.config
    if not lacking:
        out.print("every finished task of the file has statistics already (--again gathers them once more)")
        return
    model, tokenizer, _ = load_model(config)
    targets = find_targets(model, config.adapter.target_modules, str(config.file))
    pad_id = model_limits.padding_id(tokenizer, model_limits.vocabulary(model))
    base = TrainableBase(model, targets, projections(checkpoint, targets), pad_id)
    with Progress(out) as progress:
        report = progress.part("gathering statistics")
        for done, name in enumerate(lacking, 1):
            seed = seeds_of(config.seed, name)[TRAINING_SEED]
            try:
                data = gather_again(base, checkpoint, name, prepared.data[name].train, seed)
            except (RuntimeError, NotImplementedError, ArithmeticError) as error:  # no memory, no embedding, not finite
                message = f"the statistics of task {name!r} cannot be gathered ({one_line(error)})"
                remedy = "try a machine with more memory, or precision: float32"
                raise ConfigError(Problem(message, remedy=remedy)) from error
            checkpoint.set_statistics(name, data)
            report(done, len(lacking), name)
    for name in lacking:
        stored = checkpoint.manifest.task(name).statistics
        assert stored is not None
        out.print(f"{name}: statistics in {checkpoint.path / stored.path} ({size_text(stored.bytes)})")


def _lacks_statistics(checkpoint: Checkpoint, task: str) -> bool:
    """Whether a task has no statistics, or damaged ones."""
    from loraf_train.retention.of_checkpoint import stored_statistics

    try:
        return stored_statistics(checkpoint, task) is None
    except CorruptCheckpoint:
        return True
