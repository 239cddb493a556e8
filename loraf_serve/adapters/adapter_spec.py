"""The option `--adapter [NAME=]CKPT[#REVISION][@task+task]`, from its text to checked checkpoints.

Task files are not read here: `loraf_serve.adapters.library` reads them, or has the backend read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraf.errors import ConfigError, LorafError, Problem
from loraf.hub import HUB_ID, checkpoint_folder, split_revision
from loraf.tasksets import NAME_PATTERN, name_problem
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder, read_values
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import ServedAdapter

_REMEDY = "write [NAME=]CKPT[@task+task], for example mine=./ckpt@math+nlu"


@dataclass(frozen=True)
class AdapterSpec:
    """The parts of one `--adapter` value.

    Attributes:
        text: the value as it was written.
        source: a folder or a hub id.
        tasks: the tasks to serve, in the order given; None for all.
        revision: a branch, tag or commit of the hub id; None for its main branch.
    """

    text: str
    name: str
    source: str
    tasks: tuple[str, ...] | None = None
    revision: str | None = None


def parse_spec(text: str) -> AdapterSpec:
    """Parses `[NAME=]CKPT[#REVISION][@task+task]`. Without NAME, the last part of CKPT is the name.

    A path may contain `=`, `#` or `@`: unlike a path, a name or a task never contains a `/`, and only a hub id has a
    revision.

    Raises:
        ConfigError: an invalid name, no CKPT, a malformed revision or one of a local folder, or a task named twice.
    """
    field = f"--adapter {text}"
    before, equals, after = text.partition("=")
    name, source = (before, after) if equals and "/" not in before else ("", text)
    tasks: tuple[str, ...] | None = None
    head, at, tail = source.rpartition("@")
    problems = []
    if at and "/" not in tail:
        source, tasks = head, tuple(part.strip() for part in tail.split("+"))
        invalid = [task for task in tasks if not NAME_PATTERN.fullmatch(task)]
        if invalid:
            problems.append(Problem(f"{', '.join(map(repr, invalid))} is not a task name", field, remedy=_REMEDY))
        elif len(set(tasks)) < len(tasks):
            problems.append(Problem("names a task twice", field, remedy="name each task once"))
    revision = None
    try:
        source, revision = split_revision(source, field)
    except ConfigError as error:
        source = source.partition("#")[0]
        problems += error.problems
    if not source:
        problems.append(Problem("names no checkpoint", field, remedy=_REMEDY))
    elif not name:
        name = _last_part(source)
        if name_problem(name):
            message, remedy = f"{name!r} cannot be the adapter's name", f"give it one: --adapter NAME={text}"
            problems.append(Problem(message, field, remedy=remedy))
    else:
        problem = name_problem(name, "adapter", field=field)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(problems)
    return AdapterSpec(text, name, source, tasks, revision)


def _last_part(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.is_dir() else source.rstrip("/").rpartition("/")[2]


def check_adapter(spec: AdapterSpec, model_folder: Path, allow_other_base: bool = False) -> ServedAdapter:
    """Finds one checkpoint, downloading it if it is on the hub, and checks everything that its manifest shows.

    Args:
        model_folder: the served model.

    Returns:
        The adapter, without values.

    Raises:
        ConfigError: neither a folder nor a checkpoint that the hub has; or it has no task.
        CheckpointError, CorruptCheckpoint, BaseMismatch, UnknownTask: it cannot be served.
    """
    folder = CheckpointFolder.read(_folder(spec), spec.tasks)
    folder.require_servable(model_folder, allow_other_base)
    return folder.served_as(spec.name)


def open_adapter(spec: AdapterSpec, model_folder: Path, allow_other_base: bool = False) -> ServedAdapter:
    """`check_adapter`, and reads the values. Raises also what `read_values` raises."""
    return read_values(check_adapter(spec, model_folder, allow_other_base))


def check_adapters(texts: Sequence[str], model_folder: Path, allow_other_base: bool = False) -> Registry:
    """`check_adapter` for every `--adapter` of the command line.

    Raises:
        ConfigError: everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    adapters: dict[str, ServedAdapter] = {}
    for text in texts:
        field = f"--adapter {text}"
        try:
            spec = parse_spec(text)
            if spec.name in adapters:
                message, remedy = f"the name {spec.name!r} is taken", "give each adapter a name: --adapter NAME=CKPT"
                raise ConfigError(Problem(message, field, remedy=remedy))
            adapters[spec.name] = check_adapter(spec, model_folder, allow_other_base)
        except LorafError as error:
            problems += [p if p.file or p.field.startswith("--") else replace(p, field=field) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return Registry(adapters.values())


def _folder(spec: AdapterSpec) -> Path:
    """The checkpoint's folder; from the hub only the manifest and the selected tasks' files are downloaded."""
    local = Path(spec.source).expanduser()
    if local.is_dir():
        return local.resolve()
    field = f"--adapter {spec.text}"
    if not HUB_ID.fullmatch(spec.source):
        remedy = "name a folder written by `loraf-train run`, or a hub id such as org/adapter"
        raise ConfigError(Problem(f"there is no checkpoint {spec.source!r}", field, remedy=remedy))
    return checkpoint_folder(spec.source, spec.revision, field, spec.tasks)
