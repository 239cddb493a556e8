"""What tasks.yaml may say, and what is left of it once every default and override is resolved.

    load(path, overrides) -> RunConfig          every mistake of the file at once, or a frozen configuration

Each field's description says what may stand there; it is the remedy of the message when something else does.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from loraf.errors import ConfigError, Problem
from loraf.tasksets import name_problem
from loraf_train import config_errors, yaml_file
from loraf_train.metrics import MEAN

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GENERIC_NAMES = frozenset({"train", "test", "dev", "eval", "valid", "validation", "evaluation", "data"})

Metric = Literal["exact_match", "gsm8k", "choice", "loss"]
Start = Literal["previous", "base"]
Tracker = Literal["tensorboard", "wandb"]


def _mistake(message: str, remedy: str) -> PydanticCustomError:
    escaped = {"message": message, "remedy": remedy}
    return PydanticCustomError("loraf", "{message}", escaped)


def _no_boolean(value: Any) -> Any:
    """YAML's true, yes and on are no numbers, though Python would take them for 1."""
    if isinstance(value, bool):
        raise _mistake(f"{value!r} is no number", "")
    return value


def _trackers(value: Any) -> Any:
    """transformers' spellings: one name, a list of names, or none."""
    if value is None or value == "none" or value == ["none"]:
        return ()
    return (value,) if isinstance(value, str) else value


def _task_name(name: str) -> str:
    problem = name_problem(name)
    if problem:
        raise _mistake(problem.message, problem.remedy)
    return name


def _template(text: str) -> str:
    """Only `{field}` and `{field[key]}`: a record has no attributes, and positions have no names."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise _mistake(f"is no template ({error})", "write {field}, and {{ or }} for a brace itself") from None
    for name in names:
        first = name.split("[")[0]
        if not first or first.isdigit() or "." in name:
            raise _mistake(f"{{{name}}} names no field", "write the name of a record's field in braces")
    return text


Settings = TypeVar("Settings", bound=BaseModel)
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_boolean)]
TaskName = Annotated[str, AfterValidator(_task_name)]
Template = Annotated[str, AfterValidator(_template)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


class CalibrationConfig(_Model):
    """How a task's positions are chosen (Algorithm 1): B trained dense for a few mini-batches, the top K kept.

    `learning_rate` and `batch_size` None: those of the task's training. `load` fills them in.
    """

    steps: Whole = Field(32, ge=1, description="a whole number from 1, for example 32")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    learning_rate: Number | None = Field(None, gt=0, description="a number above 0, for example 1e-4")
    batch_size: Whole | None = Field(None, ge=1, description="a whole number from 1, for example 32")


class TrainingConfig(_Model):
    """How a task's K values are trained.

    Attributes:
        batch_size: examples an optimizer step sees, over all processes and accumulation steps.
        max_length: tokens of an example, prompt, completion and end of sequence together.
        micro_batch_size: examples a process takes at once; gradient accumulation makes up the rest.
        max_steps: optimizer steps, instead of `epochs`.
        packing: several examples in a row of up to max_length tokens, see `loraf_train.packing`.
        report_to: trackers that are told of every step, see `loraf_train.trackers`.
        save_seconds: most time between two saves of an unfinished task, so that a killed run loses no more than that.
    """

    learning_rate: Number = Field(1e-4, gt=0, description="a number above 0, for example 1e-4")
    batch_size: Whole = Field(32, ge=1, description="a whole number from 1, for example 32")
    epochs: Number = Field(1.0, gt=0, description="a number above 0, for example 3")
    max_length: Whole = Field(512, ge=2, description="a whole number of tokens from 2, for example 512")
    dropout: Number = Field(0.05, ge=0, lt=1, description="a number from 0 up to, not including, 1")
    warmup_steps: Whole = Field(0, ge=0, description="a whole number from 0")
    weight_decay: Number = Field(0.0, ge=0, description="a number from 0")
    max_grad_norm: Number = Field(1.0, gt=0, description="a number above 0, for example 1.0")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="constant, linear or cosine")
    micro_batch_size: Whole | None = Field(None, ge=1, description="a whole number from 1, at most batch_size")
    gradient_checkpointing: bool = Field(False, description="true or false")
    max_steps: Whole | None = Field(None, ge=1, description="a whole number from 1")
    packing: bool = Field(False, description="true or false")
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers)] = Field(
        (), description="tensorboard, wandb, a list of them, or none"
    )
    save_seconds: Number = Field(60.0, ge=0, description="a number of seconds from 0, for example 60")


class AdapterConfig(_Model):
    """The adapter's shape, the same for every task of a checkpoint; `sparsity` is the default of its tasks."""

    rank: Whole = Field(64, ge=1, le=1 << 16, description="a whole number from 1, for example 64")
    sparsity: Number = Field(0.9, gt=0, lt=1, description="a number above 0 and below 1, for example 0.9")
    target_modules: tuple[str, ...] = Field(
        PROJECTIONS, min_length=1, description=f"a list of projections, for example [{', '.join(PROJECTIONS[:2])}]"
    )
    init_std: Number | None = Field(None, gt=0, description="a number above 0, or leave it out for 1/√(3·d_in)")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="bfloat16, float16 or float32")


class Source(_Model):
    """Where records come from: a file, or a Hugging Face dataset (of the hub, or a folder).

    Attributes:
        subset: one of the dataset's configurations, where it has several.
        split: train of training data and test of evaluation sets, unless it is said.
        revision: a branch, tag or commit of the dataset's repository.
    """

    file: Path | None = Field(None, description="a data file: " + ", ".join(FILE_SUFFIXES))
    dataset: str | None = Field(None, min_length=1, description="the name of a Hugging Face dataset")
    subset: str | None = Field(None, description="the name of one of the dataset's configurations")
    split: str | None = Field(None, description="a split such as train or test[:100]")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub, in quotes")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Path):
            return {"file" if _is_file(str(value), info) else "dataset": str(value)}
        return value

    @field_validator("dataset")
    @classmethod
    def _local_dataset(cls, dataset: str | None, info: ValidationInfo) -> str | None:
        """A folder, which `datasets` takes too, becomes absolute."""
        if dataset is None or not info.context:
            return dataset
        folder = info.context["folder"] / Path(dataset).expanduser()
        return str(folder) if folder.is_dir() else dataset

    @field_validator("file")
    @classmethod
    def _exists(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is None or not info.context:
            return file
        file = info.context["folder"] / file.expanduser()
        if not file.is_file():
            raise _mistake(f"there is no file {file}", f"paths are relative to {info.context['folder']}")
        if file.suffix not in FILE_SUFFIXES:
            raise _mistake(f"{file.name} has no known format", f"use one of: {', '.join(FILE_SUFFIXES)}")
        return file

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise _mistake("names no source of records", "give either file: or dataset:")
        of_datasets = [key for key in ("subset", "split", "revision") if getattr(self, key) is not None]
        if self.file is not None and of_datasets:
            raise _mistake(f"a file has no {' and no '.join(of_datasets)}", "leave it out, or give dataset: instead")
        return self

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        name = f"{self.dataset}@{self.revision}" if self.revision else self.dataset
        return ":".join(part for part in (name, self.subset, self.split) if part)


class EvaluationSource(Source):
    """Records to score a task on; `choices` are the answers that the `choice` metric looks for."""

    choices: tuple[str, ...] = Field((), description='a list of texts, for example ["true", "false"]')


def _is_file(text: str, info: ValidationInfo) -> bool:
    """Whether a bare text names a file rather than a dataset of the hub."""
    if info.context and (info.context["folder"] / Path(text).expanduser()).is_dir():
        return False
    return Path(text).suffix in FILE_SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _named(value: Any) -> Any:
    """`eval` in its short forms: one source or a list of them, named after their files."""
    if value is None:
        return {}
    if isinstance(value, dict) and not value.keys() & Source.model_fields.keys():
        return value
    named: dict[str, Any] = {}
    for source in _listed(value):
        name = _source_name(source)
        if name in named:
            raise _mistake(f"two evaluation sets would be named {name!r}", "write eval: {name: file, name: file}")
        named[name] = source
    return named


def _source_name(source: Any) -> str:
    origin = source.get("file") or source.get("dataset") if isinstance(source, dict) else source
    path = Path(str(origin))
    return path.parent.name if path.stem in GENERIC_NAMES and path.parent.name else path.stem


class DataConfig(_Model):
    """A task's records and how they become text.

    Attributes:
        prompt, completion: templates over a record's fields; None: by the records' form (see `loraf_train.data`).
        limit, eval_limit: take only so many records of all training files, of each evaluation set, after a shuffle
            seeded by the run's seed.
    """

    train: Annotated[tuple[Source, ...], BeforeValidator(_listed)] = Field(
        min_length=1, description="a data file, a Hugging Face dataset, or a list of them"
    )
    eval: Annotated[dict[str, EvaluationSource], BeforeValidator(_named)] = Field(
        default_factory=dict, description="a data file, a list of them, or a mapping of names to files"
    )
    prompt: Template | None = Field(None, description='a template such as "{question}\\n"')
    completion: Template | None = Field(None, description='a template such as "{answer}"')
    limit: Whole | None = Field(None, ge=1, description="a whole number from 1")
    eval_limit: Whole | None = Field(None, ge=1, description="a whole number from 1")

    @field_validator("eval")
    @classmethod
    def _no_mean(cls, sets: dict[str, EvaluationSource]) -> dict[str, EvaluationSource]:
        if MEAN in sets:
            raise _mistake(f"{MEAN!r} is taken as a name of an evaluation set", "choose another name")
        return sets


class TaskConfig(_Model):
    """A task with everything resolved.

    Attributes:
        alpha: ΔW is scaled by alpha / rank; the rank if the file does not say.
        start: whether earlier tasks act while this one is trained.
        max_new_tokens: tokens generated for an answer when scoring; None: the metric's default.
    """

    name: TaskName
    alpha: float
    sparsity: float
    data: DataConfig
    calibration: CalibrationConfig = CalibrationConfig()
    training: TrainingConfig = TrainingConfig()
    metric: Metric = "exact_match"
    start: Start = "previous"
    max_new_tokens: int | None = None


class RunConfig(_Model):
    """A whole file, resolved. `file` is where it was read from; `output` and data files are absolute paths."""

    model: str
    output: Path
    tasks: tuple[TaskConfig, ...]
    adapter: AdapterConfig = AdapterConfig()
    revision: str | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recipe: Literal["paper"] = "paper"
    start: Start = "previous"
    file: Path = Path("tasks.yaml")


class _TaskEntry(_Model):
    """A task as the file writes it: everything but name and data may be left to the run."""

    name: TaskName = Field(description="1 to 64 of a-z, 0-9, '.', '_', '-'")
    data: DataConfig = Field(description="a mapping with train: and, if wanted, eval:, prompt:, completion:")
    alpha: Number | None = Field(None, gt=0, description="a number above 0, for example 64")
    sparsity: Number | None = Field(None, gt=0, lt=1, description=AdapterConfig.model_fields["sparsity"].description)
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="a mapping of calibration settings")
    training: TrainingConfig = Field(TrainingConfig(), description="a mapping of training settings")
    metric: Metric = Field("exact_match", description="exact_match, gsm8k, choice or loss")
    start: Start | None = Field(None, description="previous or base")
    max_new_tokens: Whole | None = Field(None, ge=1, description="a whole number from 1")


class _RunEntry(_Model):
    """The file without its tasks, which are validated one by one."""

    model: str = Field(min_length=1, description="a hub id, a local folder, or tiny")
    output: Path = Field(description="the folder of the checkpoint, for example ./ckpt")
    tasks: list[Any] = Field(min_length=1, description="a list with at least one task")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub, in quotes")
    seed: Whole = Field(0, ge=0, lt=1 << 32, description="a whole number from 0 to 4294967295")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    recipe: Literal["paper"] = Field("paper", description="paper")
    start: Start = Field("previous", description="previous or base")
    adapter: AdapterConfig = Field(AdapterConfig(), description="a mapping with rank:, sparsity: …")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="a mapping of calibration settings")
    training: TrainingConfig = Field(TrainingConfig(), description="a mapping of training settings")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a tasks.yaml.

    Args:
        overrides: `key=value` as of `--set`, the value in YAML: `training.epochs=1`, `tasks.math.alpha=32`,
            `tasks[0].data.limit=100`. A run-level value does not replace a task's own.

    Raises:
        ConfigError: every mistake that the file alone shows; what needs the model or the records is
            `loraf_train.preflight`'s.
    """
    config, problems = draft(path, overrides)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def draft(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[Problem]]:
    """As `load`, but gives what can be used beside the mistakes, so that a caller can look for more of them.

    Where a value is wrong its default stands in; a task that cannot be read is left out. None: nothing can be used.
    """
    path = Path(path)
    document = yaml_file.read(path, overrides)
    if document.content is None:
        return None, document.problems
    folder = path.absolute().parent
    reader = config_errors.Reader(document, str(path), {"folder": folder})
    run = reader.validate(_RunEntry, ())
    tasks = [(i, reader.validate(_TaskEntry, ("tasks", i))) for i in range(len(reader.entries("tasks")))]
    _cross_checks(reader, tasks)
    if run is None:
        return None, reader.problems
    resolved = tuple(_resolve(entry, run) for _, entry in tasks if entry is not None)
    local = folder / Path(run.model).expanduser()
    config = RunConfig(
        **run.model_dump(include={"revision", "seed", "precision", "recipe", "start"}),
        model=str(local) if run.model != "tiny" and local.is_dir() else run.model,
        output=folder / run.output.expanduser(),
        adapter=run.adapter,
        tasks=resolved,
        file=path,
    )
    return config, reader.problems


def _resolve(entry: _TaskEntry, run: _RunEntry) -> TaskConfig:
    training = _overridden(run.training, entry.training)
    calibration = _overridden(run.calibration, entry.calibration)
    if calibration.learning_rate is None:
        calibration = calibration.model_copy(update={"learning_rate": training.learning_rate})
    if calibration.batch_size is None:
        calibration = calibration.model_copy(update={"batch_size": training.batch_size})
    return TaskConfig(
        name=entry.name,
        alpha=float(run.adapter.rank) if entry.alpha is None else entry.alpha,
        sparsity=run.adapter.sparsity if entry.sparsity is None else entry.sparsity,
        data=entry.data,
        calibration=calibration,
        training=training,
        metric=entry.metric,
        start=entry.start or run.start,
        max_new_tokens=entry.max_new_tokens,
    )


def _overridden(of_run: Settings, of_task: Settings) -> Settings:
    return of_run.model_copy(update={key: getattr(of_task, key) for key in of_task.model_fields_set})


def _cross_checks(reader: config_errors.Reader, tasks: list[tuple[int, _TaskEntry | None]]) -> None:
    """Contradictions between values that are each in order."""
    seen: set[str] = set()
    for i, entry in enumerate(reader.entries("tasks")):
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in seen:
            reader.add(("tasks", i, "name"), f"another task is named {name!r} too", "give each task its own name")
        elif isinstance(name, str):
            seen.add(name)
    for i, entry in tasks:
        if entry is None:
            continue
        if entry.metric == "choice":
            for name, source in entry.data.eval.items():
                if not source.choices:
                    remedy = 'write eval: {name: {file: …, choices: ["true", "false"]}}'
                    reader.add(("tasks", i, "data", "eval", name), "the metric choice needs choices", remedy)
