"""From a tasks.yaml to a `RunConfig`.

    load(path, overrides) -> RunConfig          a frozen configuration, or all mistakes of the file at once

Opens no data file and no model; the only code that it imports is a metric of the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraf.errors import ConfigError, Problem
from loraf_train.grading import custom
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS
from loraf_train.settings import yaml_file
from loraf_train.settings.comparison import MethodSettings, contradictions
from loraf_train.settings.config import Recipe, RunConfig, RunFile, TaskConfig, TaskEntry
from loraf_train.settings.declare import SettingsModel
from loraf_train.settings.objections import objections
from loraf_train.settings.parts import TaskOverrides
from loraf_train.settings.problems import SettingsReader

Entries = list[tuple[int, TaskEntry]]  # index in the file's list, and the task


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a tasks.yaml.

    Args:
        overrides: `key=value` pairs of `--set`, the value in YAML: `training.epochs=1`, `tasks.math.alpha=32`,
            `tasks[0].data.limit=100`. A run-level value does not replace a task's own.

    Raises:
        ConfigError: every mistake that the file alone shows. `loraf_train.sequence.preflight` finds those that need
            the model or the records.
    """
    config, problems = draft(path, overrides)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def draft(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[Problem]]:
    """As `load`, but returns what is usable along with the mistakes, so that a caller can look for more of them.

    A wrong value is replaced by its default; a task that cannot be read is left out. None: nothing is usable.
    """
    path = Path(path)
    document = yaml_file.read(path, overrides)
    if document.content is None:
        return None, document.problems
    folder = path.absolute().parent
    reader = SettingsReader(document, str(path), {"folder": folder})
    run = reader.validate(RunFile, ())
    validated = [(i, reader.validate(TaskEntry, ("tasks", i))) for i in range(len(reader.entries("tasks")))]
    entries = [(i, entry) for i, entry in validated if entry is not None]
    _check_names(reader)
    _check_choices(reader, entries, run.recipe if run is not None else "paper")
    grades = _grades(reader, entries, folder)
    if run is not None:
        for where, message, remedy in objections(run, [(i, entry, _resolve(entry, run, None)) for i, entry in entries]):
            reader.add(where, message, remedy)
    if run is None:
        return None, reader.problems
    names = [str(entry["name"]) for entry in reader.entries("tasks") if isinstance(entry, dict) and "name" in entry]
    for where, message, remedy in contradictions(run.compare, names):
        reader.add(("compare", *where), message, remedy)
    local = folder / Path(run.model).expanduser()
    resolved = {
        "model": str(local) if run.model != "tiny" and local.is_dir() else run.model,
        "output": folder / run.output.expanduser(),
        "tasks": tuple(_resolve(entry, run, grades.get(i)) for i, entry in entries),
        "file": path,
    }
    config = RunConfig(**_values(run, RunFile) | resolved)
    methods = {name: _of_method(method, config, entries, run, grades) for name, method in run.compare.methods.items()}
    return config.model_copy(update={"methods": methods}), reader.problems


def _of_method(
    method: MethodSettings, config: RunConfig, entries: Entries, run: RunFile, grades: dict[int, custom.Grade]
) -> RunConfig:
    """The configuration with a method's own settings."""
    adapter = run.adapter.model_copy(update={} if method.rank is None else {"rank": method.rank})
    run = run.model_copy(update={"adapter": adapter})
    tasks = tuple(
        _resolve(entry, run, grades.get(i), method, method.tasks.get(entry.name, TaskOverrides()))
        for i, entry in entries
    )
    return config.model_copy(update={"adapter": adapter, "tasks": tasks})


def _resolve(entry: TaskEntry, run: RunFile, grade: custom.Grade | None, *overrides: TaskOverrides) -> TaskConfig:
    """Resolves a task's settings: the last of run, entry and `overrides` that gives a value wins."""
    values: dict[str, Any] = {
        "alpha": float(run.adapter.rank),
        "sparsity": run.adapter.sparsity,
        "calibration": run.calibration,
        "training": run.training,
    }
    for part in (entry, *overrides):
        for key, value in _values(part, TaskOverrides).items():
            values[key] = _overridden(values[key], value)
    values["calibration"] = values["calibration"].resolved(values["training"])
    start = entry.start or run.start
    of_run = {"start": start, "objective": entry.objective or run.objective, "grade": grade, "recipe": run.recipe}
    return TaskConfig(**_values(entry, TaskEntry) | values | of_run)


def _values(settings: SettingsModel, model: type[SettingsModel]) -> dict[str, Any]:
    """The values of those fields that `model` declares."""
    return {key: getattr(settings, key) for key in model.model_fields}


def _overridden(value: Any, override: Any) -> Any:
    if isinstance(override, SettingsModel):
        return value.model_copy(update={key: getattr(override, key) for key in override.model_fields_set})
    return value if override is None else override


def _check_names(reader: SettingsReader) -> None:
    seen: set[str] = set()
    for i, entry in enumerate(reader.entries("tasks")):
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in seen:
            reader.add(("tasks", i, "name"), f"another task is named {name!r} too", "give each task its own name")
        elif isinstance(name, str):
            seen.add(name)


def _check_choices(reader: SettingsReader, entries: Entries, recipe: Recipe) -> None:
    """The recipe lori finds missing choices in the records; otherwise the file must give them."""
    for i, entry in entries:
        if entry.metric == "choice" and recipe == "paper":
            for name, source in entry.data.eval.items():
                if not source.choices:
                    remedy = 'write eval: {name: {file: …, choices: ["true", "false"]}}'
                    reader.add(("tasks", i, "data", "eval", name), "the metric choice needs choices", remedy)


def _grades(reader: SettingsReader, entries: Entries, folder: Path) -> dict[int, custom.Grade]:
    """Imports the users' own metrics. Returns index of the task → function."""
    grades = {}
    for i, entry in entries:
        if entry.metric is not None and entry.metric not in DEFAULT_NEW_TOKENS:
            try:
                grades[i] = custom.find(entry.metric, folder)
            except custom.MetricFault as fault:
                reader.add(("tasks", i, "metric"), fault.message, fault.remedy)
    return grades
