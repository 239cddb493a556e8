"""Finds every mistake before training starts: in settings, model, records, capacity and output folder.

`run`, `eval` and `check` all begin here, so each reports all mistakes of a file at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest
from loraf.errors import ConfigError, LorafError, Problem
from loraf.manifest import Manifest
from loraf_train.data.examples import Example
from loraf_train.data.task_data import TaskData, load_all
from loraf_train.processes import launcher
from loraf_train.retention import base_text
from loraf_train.sequence.base_checks import BaseModelShape, base_model_shape, load_tokenizer
from loraf_train.sequence.experts import untouched_experts
from loraf_train.sequence.model_fit import beyond_context, oversized
from loraf_train.sequence.provenance import EXAMPLES_DIGEST
from loraf_train.settings import loading
from loraf_train.settings.config import RunConfig
from loraf_train.settings.data import RecordSource
from loraf_train.terminal.tables import quiet_libraries
from loraf_train.trainer import trackers
from loraf_train.trainer.trl_package import missing as missing_trl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedRun:
    """A run in which no mistake was found.

    Attributes:
        existing: the checkpoint in the output folder, if there is one.
        warnings: non-fatal problems.
        base_text: the general text that `retention.base` names; None: it names none.
    """

    config: RunConfig
    model: BaseModelShape
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, TaskData]
    existing: Manifest | None
    warnings: list[Problem]
    base_text: list[Example] | None = None

    @property
    def waiting(self) -> list[str]:
        """Names of the file's tasks that the checkpoint does not have yet."""
        finished = self.existing.task_names if self.existing else ()
        return [task.name for task in self.config.tasks if task.name not in finished]


def prepare(path: str | Path, overrides: Sequence[str] = (), eval_limit: int | None = None) -> PreparedRun:
    """Reads a tasks.yaml, the model's config and tokenizer, all records and the output folder's manifest.

    Raises:
        ConfigError: all mistakes in any of them.
    """
    prepared, problems, _ = survey(path, overrides, eval_limit)
    if prepared is None:
        raise ConfigError(problems)
    return prepared


def survey(
    path: str | Path, overrides: Sequence[str] = (), eval_limit: int | None = None, into_checkpoint: bool = True
) -> tuple[PreparedRun | None, list[Problem], list[Problem]]:
    """Does what `prepare` does, but returns the mistakes instead of raising them.

    Args:
        into_checkpoint: False: do not look into the output folder or check that the tasks fit into one checkpoint.

    Returns:
        The run (None if there are mistakes), the mistakes, and the warnings.
    """
    config, problems = loading.draft(path, overrides)
    if config is None:
        return None, problems, []
    quiet_libraries()
    model, tokenizer = _model(config, problems)
    today = recorded_date(config.output) if into_checkpoint else None
    data, data_problems = load_all(config, tokenizer, eval_limit, today)
    problems += data_problems
    if config.quantization is not None:
        problems += _four_bits(config)
    problems += trackers.missing(config) + launcher.problems() + _preferences(config)
    text = _base_text(config, model, tokenizer, problems)
    existing = _existing(config, problems) if into_checkpoint else None
    if model is not None:
        if into_checkpoint:
            from loraf_train.sequence.conflicts import damage, obstacles  # imports torch, which takes seconds

            problems += obstacles(config, model.folder, model.modules, existing)
            problems += damage(config, existing) if existing else []
        if tokenizer is not None:
            problems += oversized(config, model, tokenizer, data)
    warnings = _warnings(config, model, data)
    if not problems:  # another tokenizer, say, makes other examples
        warnings += _edited_data(config, existing, data)
    if problems or model is None or tokenizer is None:
        return None, problems, warnings
    return PreparedRun(config, model, tokenizer, data, existing, warnings, text), [], warnings


def _four_bits(config: RunConfig) -> list[Problem]:
    """What a base in four bits lacks here."""
    import torch

    from loraf_train.adapter import quantised

    file = str(config.file)
    problem = quantised.machine_problem(file, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    problems = [problem] if problem is not None else []
    if launcher.sharding() is not None:
        remedy = "launch without FSDP; the processes still divide each batch"
        problems.append(Problem("a base in four bits is not sharded", quantised.FIELD, file, remedy))
    return problems


def _preferences(config: RunConfig) -> list[Problem]:
    """What tasks with objective: dpo lack here."""
    field = next((f"tasks[{i}].objective" for i, task in enumerate(config.tasks) if task.objective == "dpo"), None)
    if field is None:
        return []
    problems = missing_trl(field, str(config.file))
    if launcher.sharding() is not None:
        remedy = "launch without FSDP; the processes still divide each batch"
        problems.append(Problem("dpo does not train a sharded model", field, str(config.file), remedy))
    return problems


def recorded_date(output: Path) -> date | None:
    """Returns the date on which the run into this folder was begun; None: not yet, or no prompt names a date.

    It is that of the first task that names one, so that an interrupted run goes on with the same prompts on any day.
    """
    try:
        tasks = manifest.read(output).tasks if (output / manifest.FILE_NAME).exists() else ()
    except LorafError:  # reported with the output folder
        tasks = ()
    begun = [str(task.training.get("date", "")) for task in tasks]
    if not any(begun) and output.is_dir():
        from loraf_train.sequence import resume  # imports torch, which takes seconds

        begun.append(resume.begun_on(output))
    for text in filter(None, begun):
        with suppress(ValueError):
            return date.fromisoformat(text)
    return None


def _model(config: RunConfig, problems: list[Problem]) -> tuple[BaseModelShape | None, PreTrainedTokenizerBase | None]:
    from loraf import base_model

    file = str(config.file)
    try:
        folder = base_model.resolve(config.model, config.revision, file)
    except ConfigError as error:
        problems += error.problems
        return None, None
    tokenizer = shape = None
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as error:
        problems += error.problems
    try:
        shape = base_model_shape(folder, config.adapter.target_modules, file, config.attn_implementation)
    except ConfigError as error:
        problems += error.problems
    return shape, tokenizer


def _base_text(
    config: RunConfig,
    model: BaseModelShape | None,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: list[Problem],
) -> list[Example] | None:
    """The general text that the file names; None if it names none or the text cannot be used."""
    source = None if config.retention is None else config.retention.base
    if source == base_text.SELF and launcher.sharding() is not None:
        problems.append(base_text.sharded_problem(str(config.file)))
    if isinstance(source, RecordSource) and model is not None and tokenizer is not None:
        try:
            return base_text.read(source, tokenizer, model.context, model.vocabulary)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return None


def _existing(config: RunConfig, problems: list[Problem]) -> Manifest | None:
    """The checkpoint in the output folder; None if there is none or it cannot be read."""
    output, file = config.output, str(config.file)
    if not (output / manifest.FILE_NAME).exists():
        ancestor = next(p for p in (output, *output.parents) if p.exists())
        if not ancestor.is_dir():
            problems.append(Problem(f"{ancestor} is not a folder", "output", file, "name a folder"))
        elif not os.access(ancestor, os.W_OK | os.X_OK):
            remedy = "name a folder that you may write to"
            problems.append(Problem(f"{ancestor} is not writable", "output", file, remedy))
        return None
    try:
        return manifest.read(output)
    except LorafError as error:
        problems += error.problems
        return None


def _warnings(config: RunConfig, model: BaseModelShape | None, data: dict[str, TaskData]) -> list[Problem]:
    """Examples that max_length cuts or drops, doubts about records, and what is longer than the model's context."""
    warnings = []
    first_index = {task.name: i for i, task in reversed(list(enumerate(config.tasks)))}
    for i, task in enumerate(config.tasks):
        task_data = data.get(task.name)
        if task_data is None or first_index[task.name] != i:
            continue
        if task_data.cut or task_data.dropped:
            message = (
                f"max_length {task.training.max_length} cuts the end of {task_data.cut} examples and drops "
                f"{task_data.dropped} of which nothing to learn is left "
                f"({len(task_data.train) + task_data.dropped} in all)"
            )
            if task_data.first_dropped:
                message += f"; the first that it drops is {task_data.first_dropped}"
            remedy = f"set it to {task_data.longest} to keep all"
            warnings.append(Problem(message, f"tasks[{i}].training.max_length", str(config.file), remedy))
        warnings += task_data.warnings
    if model is not None:
        warnings += beyond_context(config, model, data) + untouched_experts(config, model)
    return warnings


def _edited_data(config: RunConfig, existing: Manifest | None, data: dict[str, TaskData]) -> list[Problem]:
    """Finished tasks whose training examples are others than those that they were trained on."""
    warnings = []
    finished = existing.task_names if existing else ()
    for i, task in enumerate(config.tasks):
        if existing is None or task.name not in finished or task.name not in data:
            continue
        trained_on = existing.task(task.name).training.get(EXAMPLES_DIGEST)
        if trained_on is not None and trained_on != data[task.name].digest:
            message = (
                f"task {task.name!r} was trained on other examples than these: its records, the tokenizer or how "
                "records become text have changed since, and it is not trained again"
            )
            remedy = "to train on them, give the task another name or remove it with `loraf-train remove`"
            warnings.append(Problem(message, f"tasks[{i}].data.train", str(config.file), remedy))
    return warnings
