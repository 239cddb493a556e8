"""Everything that can be known to be wrong before training starts: settings, model, records, capacity, output folder.

`run`, `eval` and `check` all begin here, so that each answers a bad file with all of its mistakes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest
from loraf.errors import ConfigError, LorafError, Problem
from loraf.manifest import Manifest
from loraf_train.data.examples import TaskData, load_all
from loraf_train.processes import launcher
from loraf_train.settings import config as configs
from loraf_train.settings.config import RunConfig
from loraf_train.terminal.tables import quiet_libraries
from loraf_train.trainer import trackers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model from its config alone.

    Attributes:
        folder: where its files are.
        modules: the target modules, name → (d_out, d_in).
        parameters: of the whole model, tied weights once.
        context: longest sequence it was made for, in tokens; None: its config does not say.
        vocabulary: rows of its embedding.
    """

    folder: Path
    modules: dict[str, tuple[int, int]]
    parameters: int
    context: int | None
    vocabulary: int


@dataclass(frozen=True)
class Prepared:
    """A run without known mistakes.

    Attributes:
        existing: the checkpoint in the output folder, if there is one.
        warnings: what keeps no run from starting and is worth a look all the same.
    """

    config: RunConfig
    model: ModelFacts
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, TaskData]
    existing: Manifest | None
    warnings: list[Problem]

    @property
    def waiting(self) -> list[str]:
        """Names of the file's tasks that the checkpoint does not have yet."""
        have = self.existing.task_names if self.existing else ()
        return [task.name for task in self.config.tasks if task.name not in have]


def prepare(path: str | Path, overrides: Sequence[str] = (), eval_limit: int | None = None) -> Prepared:
    """Reads a tasks.yaml, the model's config and tokenizer, all records and the output folder's manifest.

    Raises:
        ConfigError: all mistakes found in any of them.
    """
    prepared, problems, _ = survey(path, overrides, eval_limit)
    if prepared is None:
        raise ConfigError(problems)
    return prepared


def survey(
    path: str | Path, overrides: Sequence[str] = (), eval_limit: int | None = None, into_checkpoint: bool = True
) -> tuple[Prepared | None, list[Problem], list[Problem]]:
    """As `prepare`, but gives the mistakes, and the warnings that can be had beside them. None: there are mistakes.

    Args:
        into_checkpoint: False: what is in the output folder, and whether the tasks fit in one checkpoint, is left out.
    """
    config, problems = configs.draft(path, overrides)
    if config is None:
        return None, problems, []
    quiet_libraries()
    model, tokenizer = _model(config, problems)
    data, found = load_all(config, tokenizer, eval_limit)
    problems += found
    problems += trackers.missing(config) + launcher.problems()
    existing = _existing(config, model, problems) if into_checkpoint else None
    if model is not None:
        problems += capacity(config, model, existing) if into_checkpoint else []
        problems += _fit(config, model, data)
    warnings = _warnings(config, model, data)
    if problems or model is None or tokenizer is None:
        return None, problems, warnings
    return Prepared(config, model, tokenizer, data, existing, warnings), [], warnings


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"its tokenizer cannot be loaded ({reason})"
        raise ConfigError(Problem(message, file=str(folder), remedy="add tokenizer.json to the folder")) from None


def _model(config: RunConfig, problems: list[Problem]) -> tuple[ModelFacts | None, PreTrainedTokenizerBase | None]:
    from loraf import base_model

    file = str(config.file)
    try:
        folder = base_model.resolve(config.model, config.revision, file)
    except ConfigError as error:
        problems += error.problems
        return None, None
    tokenizer = facts = None
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as error:
        problems += error.problems
    try:
        facts = model_facts(folder, config.adapter.target_modules, file)
    except ConfigError as error:
        problems += error.problems
    return facts, tokenizer


def model_facts(folder: Path, target_modules: Sequence[str], file: str = "") -> ModelFacts:
    """Builds the model without weights and finds its target modules.

    Args:
        target_modules: last parts of module names.
        file: of the configuration, for the messages.

    Raises:
        ConfigError: transformers does not know the model, or it lacks a target module.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loraf_train.adapter.host import find_targets, shapes_of

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"transformers cannot build it ({reason})"
        raise ConfigError(
            Problem(message, "model", file, "use a causal language model that transformers knows")
        ) from None
    targets = find_targets(model, target_modules, file)
    text = config.get_text_config()
    return ModelFacts(
        folder=folder,
        modules=shapes_of(targets),
        parameters=sum(p.numel() for p in model.parameters()),
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )


def _existing(config: RunConfig, model: ModelFacts | None, problems: list[Problem]) -> Manifest | None:
    """The checkpoint in the output folder; whatever keeps this run from adding to it becomes a problem."""
    output, file = config.output, str(config.file)
    if not (output / manifest.FILE_NAME).exists():
        ancestor = next(p for p in (output, *output.parents) if p.exists())
        if not ancestor.is_dir():
            problems.append(Problem(f"{ancestor} is no folder", "output", file, "name a folder"))
        elif not os.access(ancestor, os.W_OK | os.X_OK):
            problems.append(Problem(f"{ancestor} cannot be written", "output", file, "name a folder of yours"))
        return None
    try:
        found = manifest.read(output)
    except LorafError as error:
        problems += error.problems
        return None
    if model is not None:
        from loraf_train.sequence.provenance import conflicts

        problems += conflicts(config, found, model.folder, model.modules)
    return found


def capacity(config: RunConfig, model: ModelFacts, existing: Manifest | None) -> list[Problem]:
    """Tasks that find too few free positions in some module, or none at all."""
    from loraf_train.adapter.masks import Wish, shortage

    if existing is not None and existing.modules.keys() != model.modules.keys():
        return []  # reported already
    rank = existing.rank if existing else config.adapter.rank
    finished = existing.task_names if existing else ()
    wishes = [
        Wish(task.name, task.sparsity, f"tasks[{i}].sparsity", str(config.file))
        for i, task in enumerate(config.tasks)
        if task.name not in finished
    ]
    return shortage(model.modules, rank, wishes, existing)


def _fit(config: RunConfig, model: ModelFacts, data: dict[str, TaskData]) -> list[Problem]:
    """Sequences that the model cannot take: too long, or with ids beyond its vocabulary."""
    problems = []
    for i, task in enumerate(config.tasks):
        if task.name not in data:
            continue
        train = data[task.name].train
        longest = max(len(example.input_ids) for example in train)
        if model.context is not None and longest > model.context:
            message = f"task {task.name!r} has examples of {longest} tokens, the model's context is {model.context}"
            where = f"tasks[{i}].training.max_length"
            problems.append(Problem(message, where, str(config.file), f"set it to {model.context} at most"))
        highest = max(max(example.input_ids) for example in train)
        if highest >= model.vocabulary:
            message = f"the tokenizer gives id {highest}, the model's embedding has {model.vocabulary} rows"
            problems.append(Problem(message, "model", str(config.file), "use the tokenizer that belongs to the model"))
            break
    return problems


def _warnings(config: RunConfig, model: ModelFacts | None, data: dict[str, TaskData]) -> list[Problem]:
    """What max_length takes away, and questions that the model is too short for."""
    warnings = []
    first = {task.name: i for i, task in reversed(list(enumerate(config.tasks)))}
    for i, task in enumerate(config.tasks):
        found = data.get(task.name)
        if found is None or first[task.name] != i:
            continue
        if found.cut or found.dropped:
            message = (
                f"max_length {task.training.max_length} cuts the end of {found.cut} examples; {found.dropped} are left "
                f"out, since their prompt alone fills it ({len(found.train) + found.dropped} in all)"
            )
            remedy = f"set it to {found.longest} to keep all"
            warnings.append(Problem(message, f"tasks[{i}].training.max_length", str(config.file), remedy))
        for name, evaluation in found.evaluation.items():
            longest = max(len(example.prompt_ids) for example in evaluation.examples)
            if model is not None and model.context is not None and longest >= model.context:
                message = f"a prompt has {longest} tokens, the model's context is {model.context}"
                remedy = "shorten it, or count on a wrong answer"
                warnings.append(Problem(message, f"tasks[{i}].data.eval.{name}", str(config.file), remedy))
    return warnings
