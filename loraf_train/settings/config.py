"""What tasks.yaml may say, and what is left of it once every default and override is resolved.

    load(path, overrides) -> RunConfig          every mistake of the file at once, or a frozen configuration

Each field's description says what may stand there; it is the remedy of the message when something else does.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, field_validator

from loraf.errors import ConfigError, Problem
from loraf.tasksets import name_problem
from loraf_train.grading import custom
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS, MEAN
from loraf_train.settings import problems as config_errors
from loraf_train.settings import yaml_file
from loraf_train.settings.comparison import CompareConfig, MethodSettings, TaskSettings, contradictions
from loraf_train.settings.parts import CalibrationConfig, Model, Number, Source, TrainingConfig, Whole, mistake

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GENERIC_NAMES = frozenset({"train", "test", "dev", "eval", "valid", "validation", "evaluation", "data"})

Start = Literal["previous", "base"]
Recipe = Literal["paper", "lori"]


def _task_name(name: str) -> str:
    problem = name_problem(name)
    if problem:
        raise mistake(problem.message, problem.remedy)
    return name


def _template(text: str) -> str:
    """Only `{field}` and `{field[key]}`: a record has no attributes, and positions have no names."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise mistake(f"is no template ({error})", "write {field}, and {{ or }} for a brace itself") from None
    for name in names:
        first = name.split("[")[0]
        if not first or first.isdigit() or "." in name:
            raise mistake(f"{{{name}}} names no field", "write the name of a record's field in braces")
    return text


def _metric(name: str) -> str:
    if name not in DEFAULT_NEW_TOKENS and not custom.is_name(name):
        raise mistake(f"{name!r} is not known", "")
    return name


Settings = TypeVar("Settings", bound=BaseModel)
TaskName = Annotated[str, AfterValidator(_task_name)]
Template = Annotated[str, AfterValidator(_template)]
Metric = Annotated[str, AfterValidator(_metric)]


class AdapterConfig(Model):
    """The adapter's shape, the same for every task of a checkpoint; `sparsity` is the default of its tasks."""

    rank: Whole = Field(64, ge=1, le=1 << 16, description="a whole number from 1, for example 64")
    sparsity: Number = Field(0.9, gt=0, lt=1, description="a number above 0 and below 1, for example 0.9")
    target_modules: tuple[str, ...] = Field(
        PROJECTIONS, min_length=1, description=f"a list of projections, for example [{', '.join(PROJECTIONS[:2])}]"
    )
    init_std: Number | None = Field(None, gt=0, description="a number above 0, or leave it out for 1/√(3·d_in)")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="bfloat16, float16 or float32")


class EvaluationSource(Source):
    """Records to score a task on; `choices` are the answers that the `choice` metric looks for."""

    choices: tuple[str, ...] = Field((), description='a list of texts, for example ["true", "false"]')


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
            raise mistake(f"two evaluation sets would be named {name!r}", "write eval: {name: file, name: file}")
        named[name] = source
    return named


def _source_name(source: Any) -> str:
    origin = source.get("file") or source.get("dataset") if isinstance(source, dict) else source
    path = Path(str(origin))
    return path.parent.name if path.stem in GENERIC_NAMES and path.parent.name else path.stem


class DataConfig(Model):
    """A task's records and how they become text.

    Attributes:
        prompt, completion: templates over a record's fields; None: by the records' form (see `data.examples`).
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
            raise mistake(f"{MEAN!r} is taken as a name of an evaluation set", "choose another name")
        return sets


class TaskConfig(Model):
    """A task with everything resolved.

    Attributes:
        alpha: ΔW is scaled by alpha / rank; the rank if the file does not say.
        start: whether earlier tasks act while this one is trained.
        recipe: what stands in for templates and choices that the file does not give.
        max_new_tokens: tokens generated for an answer when scoring; None: the metric's default.
        grade: the function that `metric` names, where it is the user's own.
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
    grade: custom.Grade | None = None
    recipe: Recipe = "paper"


class RunConfig(Model):
    """A whole file, resolved. `file` is where it was read from; `output` and data files are absolute paths.

    Attributes:
        methods: the file as those methods of a comparison see it that `compare.methods` has settings of.
    """

    model: str
    output: Path
    tasks: tuple[TaskConfig, ...]
    adapter: AdapterConfig = AdapterConfig()
    revision: str | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recipe: Recipe = "paper"
    start: Start = "previous"
    file: Path = Path("tasks.yaml")
    compare: CompareConfig = CompareConfig()
    methods: dict[str, RunConfig] = {}

    def of_method(self, name: str) -> RunConfig:
        """The file as a method of a comparison sees it."""
        return self.methods.get(name, self)


class _TaskEntry(Model):
    """A task as the file writes it: everything but name and data may be left to the run."""

    name: TaskName = Field(description="1 to 64 of a-z, 0-9, '.', '_', '-'")
    data: DataConfig = Field(description="a mapping with train: and, if wanted, eval:, prompt:, completion:")
    alpha: Number | None = Field(None, gt=0, description="a number above 0, for example 64")
    sparsity: Number | None = Field(None, gt=0, lt=1, description=AdapterConfig.model_fields["sparsity"].description)
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="a mapping of calibration settings")
    training: TrainingConfig = Field(TrainingConfig(), description="a mapping of training settings")
    metric: Metric = Field("exact_match", description="exact_match, gsm8k, choice, loss, or your own module:function")
    start: Start | None = Field(None, description="previous or base")
    max_new_tokens: Whole | None = Field(None, ge=1, description="a whole number from 1")
    _grade: custom.Grade | None = PrivateAttr(None)


class _RunEntry(Model):
    """The file without its tasks, which are validated one by one."""

    model: str = Field(min_length=1, description="a hub id, a local folder, or tiny")
    output: Path = Field(description="the folder of the checkpoint, for example ./ckpt")
    tasks: list[Any] = Field(min_length=1, description="a list with at least one task")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub, in quotes")
    seed: Whole = Field(0, ge=0, lt=1 << 32, description="a whole number from 0 to 4294967295")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    recipe: Recipe = Field("paper", description="paper, or lori for the templates of the authors' later code")
    start: Start = Field("previous", description="previous or base")
    adapter: AdapterConfig = Field(AdapterConfig(), description="a mapping with rank:, sparsity: …")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="a mapping of calibration settings")
    training: TrainingConfig = Field(TrainingConfig(), description="a mapping of training settings")
    compare: CompareConfig = Field(CompareConfig(), description="a mapping with seeds:, general:, methods:")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a tasks.yaml.

    Args:
        overrides: `key=value` as of `--set`, the value in YAML: `training.epochs=1`, `tasks.math.alpha=32`,
            `tasks[0].data.limit=100`. A run-level value does not replace a task's own.

    Raises:
        ConfigError: every mistake that the file alone shows; what needs the model or the records is
            `loraf_train.sequence.preflight`'s.
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
    recipe = run.recipe if run is not None else "paper"
    tasks = [(i, _with_metric(entry, recipe)) for i, entry in tasks]
    _cross_checks(reader, tasks, recipe)
    _import_metrics(reader, tasks, folder)
    if run is None:
        return None, reader.problems
    entries = [entry for _, entry in tasks if entry is not None]
    named = [str(entry["name"]) for entry in reader.entries("tasks") if isinstance(entry, dict) and "name" in entry]
    for where, message, remedy in contradictions(run.compare, named):
        reader.add(("compare", *where), message, remedy)
    local = folder / Path(run.model).expanduser()
    config = RunConfig(
        **run.model_dump(include={"revision", "seed", "precision", "recipe", "start"}),
        model=str(local) if run.model != "tiny" and local.is_dir() else run.model,
        output=folder / run.output.expanduser(),
        adapter=run.adapter,
        tasks=tuple(_resolve(entry, run) for entry in entries),
        file=path,
        compare=run.compare,
    )
    methods = {name: _as_seen_by(method, config, entries, run) for name, method in run.compare.methods.items()}
    return config.model_copy(update={"methods": methods}), reader.problems


def _as_seen_by(method: MethodSettings, config: RunConfig, entries: Sequence[_TaskEntry], run: _RunEntry) -> RunConfig:
    adapter = run.adapter.model_copy(update={} if method.rank is None else {"rank": method.rank})
    run = run.model_copy(update={"adapter": adapter})
    tasks = tuple(_resolve(entry, run, method, method.tasks.get(entry.name, TaskSettings())) for entry in entries)
    return config.model_copy(update={"adapter": adapter, "tasks": tasks})


def _resolve(entry: _TaskEntry, run: _RunEntry, *more: TaskSettings) -> TaskConfig:
    """A task's settings; of run, entry and `more` the last that says something counts."""
    training, calibration = run.training, run.calibration
    alpha, sparsity = float(run.adapter.rank), run.adapter.sparsity
    for part in (entry, *more):
        training = _overridden(training, part.training)
        calibration = _overridden(calibration, part.calibration)
        alpha = alpha if part.alpha is None else part.alpha
        sparsity = sparsity if part.sparsity is None else part.sparsity
    if calibration.learning_rate is None:
        calibration = calibration.model_copy(update={"learning_rate": training.learning_rate})
    if calibration.batch_size is None:
        calibration = calibration.model_copy(update={"batch_size": training.batch_size})
    return TaskConfig(
        name=entry.name,
        alpha=alpha,
        sparsity=sparsity,
        data=entry.data,
        calibration=calibration,
        training=training,
        metric=entry.metric,
        start=entry.start or run.start,
        max_new_tokens=entry.max_new_tokens,
        grade=entry._grade,
        recipe=run.recipe,
    )


def _overridden(of_run: Settings, of_task: Settings) -> Settings:
    return of_run.model_copy(update={key: getattr(of_task, key) for key in of_task.model_fields_set})


def _with_metric(entry: _TaskEntry | None, recipe: Recipe) -> _TaskEntry | None:
    """The entry with the recipe's metric, where it names none."""
    if entry is None or recipe == "paper" or "metric" in entry.model_fields_set:
        return entry
    from loraf_train.data import lori

    metric = lori.metric_of(entry.data.train[0])
    return entry if metric is None else entry.model_copy(update={"metric": metric})


def _cross_checks(reader: config_errors.Reader, tasks: list[tuple[int, _TaskEntry | None]], recipe: Recipe) -> None:
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
        if entry.metric == "choice" and recipe == "paper":
            for name, source in entry.data.eval.items():
                if not source.choices:
                    remedy = 'write eval: {name: {file: …, choices: ["true", "false"]}}'
                    reader.add(("tasks", i, "data", "eval", name), "the metric choice needs choices", remedy)


def _import_metrics(reader: config_errors.Reader, tasks: list[tuple[int, _TaskEntry | None]], folder: Path) -> None:
    """Gives each task the function that its metric names."""
    for i, entry in tasks:
        if entry is not None and entry.metric not in DEFAULT_NEW_TOKENS:
            try:
                entry._grade = custom.find(entry.metric, folder)
            except custom.MetricFault as fault:
                reader.add(("tasks", i, "metric"), fault.message, fault.remedy)
