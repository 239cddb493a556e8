"""Finds every mistake before training starts: in settings, model, records, capacity and output folder.

`run`, `eval` and `check` all begin here, so each reports all mistakes of a file at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest
from loraf.errors import ConfigError, LorafError, Problem, one_line
from loraf.manifest import Manifest
from loraf_train.data.task_data import TaskData, load_all
from loraf_train.processes import launcher
from loraf_train.settings import loading
from loraf_train.settings.config import RunConfig
from loraf_train.terminal.tables import quiet_libraries
from loraf_train.trainer import trackers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseModelShape:
    """What a model's config alone says about it.

    Attributes:
        folder: of its files.
        modules: target module → (d_out, d_in).
        parameters: number in the whole model, tied weights counted once.
        context: longest sequence that it supports, in tokens; None: its config does not say.
        vocabulary: rows of its embedding.
    """

    folder: Path
    modules: dict[str, tuple[int, int]]
    parameters: int
    context: int | None
    vocabulary: int


@dataclass(frozen=True)
class PreparedRun:
    """A run in which no mistake was found.

    Attributes:
        existing: the checkpoint in the output folder, if there is one.
        warnings: non-fatal problems.
    """

    config: RunConfig
    model: BaseModelShape
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, TaskData]
    existing: Manifest | None
    warnings: list[Problem]

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
    data, data_problems = load_all(config, tokenizer, eval_limit)
    problems += data_problems
    problems += trackers.missing(config) + launcher.problems()
    existing = _existing(config, problems) if into_checkpoint else None
    if model is not None:
        if into_checkpoint:
            from loraf_train.sequence.conflicts import obstacles  # imports torch, which takes seconds

            problems += obstacles(config, model.folder, model.modules, existing)
        problems += _oversized(config, model, data)
    warnings = _warnings(config, model, data)
    if problems or model is None or tokenizer is None:
        return None, problems, warnings
    return PreparedRun(config, model, tokenizer, data, existing, warnings), [], warnings


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in a model's folder. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        message = f"the tokenizer cannot be loaded ({one_line(error)})"
        raise ConfigError(Problem(message, file=str(folder), remedy="add tokenizer.json to the folder")) from None


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
        shape = base_model_shape(folder, config.adapter.target_modules, file)
    except ConfigError as error:
        problems += error.problems
    return shape, tokenizer


def base_model_shape(folder: Path, target_modules: Sequence[str], file: str = "") -> BaseModelShape:
    """Builds the model without weights and finds its target modules.

    Args:
        target_modules: last parts of module names.
        file: the configuration's path, for messages.

    Raises:
        ConfigError: transformers does not support the model, or it lacks a target module.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loraf_train.adapter.trainable_base import find_targets, shapes_of

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # of transformers
    except (OSError, ValueError, KeyError) as error:
        message = f"transformers cannot build the model in {folder} ({one_line(error)})"
        remedy = "use a causal language model that this version of transformers supports"
        raise ConfigError(Problem(message, "model", file, remedy)) from None
    targets = find_targets(model, target_modules, file)
    text = config.get_text_config()
    return BaseModelShape(
        folder=folder,
        modules=shapes_of(targets),
        parameters=sum(p.numel() for p in model.parameters()),
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )


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


def _oversized(config: RunConfig, model: BaseModelShape, data: dict[str, TaskData]) -> list[Problem]:
    """Training examples that the model cannot take: too long, or with token ids beyond its embedding."""
    problems = []
    for i, task in enumerate(config.tasks):
        if task.name not in data:
            continue
        train = data[task.name].train
        longest = max(len(example.input_ids) for example in train)
        if model.context is not None and longest > model.context:
            message = f"task {task.name!r} has examples of {longest} tokens, but the model's context is {model.context}"
            field = f"tasks[{i}].training.max_length"
            problems.append(Problem(message, field, str(config.file), f"set it to {model.context} or less"))
        highest = max(max(example.input_ids) for example in train)
        if highest >= model.vocabulary:
            message = f"the tokenizer produces id {highest}, but the model's embedding has {model.vocabulary} rows"
            problems.append(Problem(message, "model", str(config.file), "use the tokenizer that belongs to the model"))
            break
    return problems


def _warnings(config: RunConfig, model: BaseModelShape | None, data: dict[str, TaskData]) -> list[Problem]:
    """Examples that max_length cuts or drops, and evaluation prompts that exceed the model's context."""
    warnings = []
    first_index = {task.name: i for i, task in reversed(list(enumerate(config.tasks)))}
    for i, task in enumerate(config.tasks):
        task_data = data.get(task.name)
        if task_data is None or first_index[task.name] != i:
            continue
        if task_data.cut or task_data.dropped:
            message = (
                f"max_length {task.training.max_length} cuts the end of {task_data.cut} examples and drops "
                f"{task_data.dropped} whose prompt alone fills it ({len(task_data.train) + task_data.dropped} in all)"
            )
            remedy = f"set it to {task_data.longest} to keep all"
            warnings.append(Problem(message, f"tasks[{i}].training.max_length", str(config.file), remedy))
        for name, evaluation in task_data.evaluation.items():
            longest = max(len(example.prompt_ids) for example in evaluation.examples)
            if model is not None and model.context is not None and longest >= model.context:
                message = f"a prompt has {longest} tokens, but the model's context is {model.context}"
                remedy = "shorten it, or expect a wrong answer"
                warnings.append(Problem(message, f"tasks[{i}].data.eval.{name}", str(config.file), remedy))
    return warnings
