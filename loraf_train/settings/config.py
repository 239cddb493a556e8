"""A tasks.yaml as a whole: what the file may say, and the same with every default and override resolved.

    TaskEntry → TaskConfig      a task
    RunFile   → RunConfig       the file

The right side is a subclass that adds only what resolving adds; `settings.loading` fills it in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from loraf.tasksets import name_problem
from loraf_train.grading import custom
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS
from loraf_train.settings.comparison import CompareConfig
from loraf_train.settings.data import DataConfig
from loraf_train.settings.declare import Seed, SettingsModel, Whole, mistake, setting
from loraf_train.settings.parts import (
    AdapterConfig,
    CalibrationConfig,
    Retention,
    RetentionConfig,
    TaskOverrides,
    TrainingConfig,
)

Start = Literal["previous", "base"]
Recipe = Literal["paper", "lori"]
Objective = Literal["sft", "dpo"]
Quantization = Literal["bnb-4bit"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


def _check_task_name(name: str) -> str:
    problem = name_problem(name)
    if problem:
        raise mistake(problem.message, problem.remedy)
    return name


def _check_metric(name: str) -> str:
    if name not in DEFAULT_NEW_TOKENS and not custom.is_name(name):
        raise mistake(f"{name!r} is not known")
    return name


def _check_output(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise mistake("is empty")  # Python would take it for the folder of the tasks.yaml
    return value


TaskName = Annotated[str, AfterValidator(_check_task_name)]
Metric = Annotated[str, AfterValidator(_check_metric)]


class TaskEntry(TaskOverrides):
    """A task as the file writes it: everything but name and data may be left to the run."""

    name: TaskName = setting(
        ..., "Name of the task, in the checkpoint and in requests.", expects="1 to 64 of a-z, 0-9, '.', '_', '-'"
    )
    data: DataConfig = setting(
        ...,
        "The task's records and how they become text.",
        expects="a mapping with train: and, optionally, eval:, prompt:, completion:",
    )
    metric: Metric | None = setting(
        None,
        "How answers are scored; by default exact_match, or what the recipe lori finds right for the records.",
        expects=f"{', '.join(DEFAULT_NEW_TOKENS)}, or your own module:function",
    )
    start: Start | None = setting(
        None,
        "Whether earlier tasks are active while this one is trained (previous) or not (base); by default the run's.",
        expects="previous or base",
    )
    objective: Objective | None = setting(
        None,
        "What the task learns from: completions (sft) or preferences between two answers (dpo); by default the run's.",
        expects="sft or dpo",
    )
    max_new_tokens: Whole | None = setting(
        None,
        "Limit on the tokens of an answer when scoring; by default 32, and 256 for gsm8k and metrics of your own.",
        expects="a whole number from 1",
        ge=1,
    )


class TaskConfig(TaskEntry):
    """A task with everything resolved that the file alone decides.

    Attributes:
        metric: None: decided by the records, see `data.task_data.TaskData.metric`.
        grade: the function that `metric` names, if it is one of the user's own.
        recipe: what supplies templates, metric and choices that the file does not give.
    """

    alpha: float
    sparsity: float
    start: Start = "previous"
    grade: custom.Grade | None = None
    recipe: Recipe = "paper"
    objective: Objective = "sft"


class RunFile(SettingsModel):
    """The file as it is written; its tasks are validated one by one, each as a `TaskEntry`."""

    model: str = setting(
        ...,
        "The base model: a hub id, a local folder, or tiny for the embedded model.",
        expects="a hub id, a local folder, or tiny",
        min_length=1,
    )
    output: Annotated[Path, BeforeValidator(_check_output)] = setting(
        ...,
        "Folder of the checkpoint, relative to the tasks.yaml.",
        expects="the folder of the checkpoint, for example ./ckpt",
    )
    revision: str | None = setting(
        None,
        "A branch, tag or commit of the model's repository; by default its main branch.",
        expects="a branch, tag or commit of the hub, in quotes",
    )
    seed: Seed = setting(
        0,
        "Seed of everything random: A, the order of examples, dropout and samples of records.",
        expects="a whole number from 0 to 4294967295",
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Precision of the base model; auto is bfloat16 on GPUs that support it, and float32 elsewhere.",
        expects="auto, float32 or bfloat16",
    )
    quantization: Quantization | None = setting(
        None,
        "Holds the base model in four bits while tasks are trained and scored, as QLoRA does; by default it is not.",
        expects="bnb-4bit, or leave it out",
    )
    attn_implementation: Attention | None = setting(
        None,
        "How the base model computes attention, by transformers' name; by default what transformers chooses for it.",
        expects="eager, sdpa, flash_attention_2, flash_attention_3 or flex_attention",
    )
    recipe: Recipe = setting(
        "paper",
        "What supplies the templates, metric and choices that a task leaves out.",
        expects="paper, or lori for the templates of the authors' later code",
    )
    start: Start = setting(
        "previous",
        "Whether earlier tasks are active while a task is trained (previous) or not (base).",
        expects="previous or base",
    )
    objective: Objective = setting(
        "sft",
        "What tasks learn from: completions (sft) or preferences between two answers (dpo).",
        expects="sft or dpo",
    )
    retention: Retention = setting(
        RetentionConfig(),
        "How much later tasks may change what earlier ones answer; off trains as the paper's Algorithm 1 does.",
        expects="off, or a mapping such as {budget: 0.2}",
    )
    adapter: AdapterConfig = setting(
        AdapterConfig(), "The shape of the adapter, which all tasks share.", expects="a mapping with rank:, sparsity: …"
    )
    calibration: CalibrationConfig = setting(
        CalibrationConfig(),
        "How each task's positions are chosen, where the task does not say otherwise.",
        expects="a mapping of calibration settings",
    )
    training: TrainingConfig = setting(
        TrainingConfig(),
        "How each task's values are trained, where the task does not say otherwise.",
        expects="a mapping of training settings",
    )
    tasks: tuple[Any, ...] = setting(
        ..., "The tasks, in the order of training.", expects="a list with at least one task", min_length=1
    )
    compare: CompareConfig = setting(
        CompareConfig(),
        "What `loraf-train compare` trains and measures.",
        expects="a mapping with seeds:, general:, methods:",
    )


class RunConfig(RunFile):
    """A whole file, resolved; the model's folder, `output` and data files are absolute paths.

    Attributes:
        tasks: each with its own settings; `calibration`, `training` and `start` here are only what tasks inherit.
        file: where it was read from.
        methods: the file as methods of a comparison see it, for those that `compare.methods` has settings for.
    """

    tasks: tuple[TaskConfig, ...]
    file: Path = Path("tasks.yaml")
    methods: dict[str, RunConfig] = {}

    def of_method(self, name: str) -> RunConfig:
        """Returns the file as a method of a comparison sees it."""
        return self.methods.get(name, self)
