"""The adapters that requests may name, and how `--adapter [NAME=]CKPT[@task+task]` becomes one.

`loraf_serve.adapters.library` changes them while the server runs.

A checkpoint is read, hashed and checked whole, A and the base model included, before anything can name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraf.base_model import require_same_base
from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, LorafError, Problem, UnknownTask
from loraf.hub import HUB_ID
from loraf.manifest import FILE_NAME, BaseModel, Manifest
from loraf.tasksets import NAME_PATTERN, name_problem
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest

_REMEDY = "write [NAME=]CKPT[@task+task], for example mine=./ckpt@math+nlu"


class Registry:
    """Adapters by name, in the order they were given. It never changes: who holds one sees the same to the end."""

    def __init__(self, adapters: Iterable[ServedAdapter] = ()):
        self._adapters = {adapter.name: adapter for adapter in adapters}

    def __iter__(self):
        return iter(tuple(self._adapters.values()))

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def with_adapter(self, adapter: ServedAdapter) -> Registry:
        """The same, but the adapter's name means this one. A name that is taken keeps its place."""
        return Registry((self._adapters | {adapter.name: adapter}).values())

    def without(self, name: str) -> Registry:
        return Registry(adapter for adapter in self if adapter.name != name)

    def manifests_alone(self) -> Registry:
        """The same without values, for a backend that reads them itself."""
        return Registry(replace(adapter, checkpoint=None) for adapter in self)

    def named(self, digest: str) -> tuple[str, ...]:
        """The names of one content."""
        return tuple(adapter.name for adapter in self if adapter.digest == digest)

    def get(self, name: str, field: str = "name") -> ServedAdapter:
        """Raises UnknownTask, naming what there is."""
        if name not in self._adapters:
            message = f"there is no adapter {name!r}" if name else "no adapter is named"
            raise UnknownTask(Problem(message, field, remedy=f"choose from: {', '.join(self._adapters) or 'none'}"))
        return self._adapters[name]

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter that a request means. The empty name means the only one; None if none is loaded.

        Raises:
            UnknownTask: there is none of that name.
            InvalidRequest: the name is empty and several are loaded.
        """
        if name:
            return self.get(name, "adapter")
        if len(self) > 1:
            remedy = f"choose from: {', '.join(self._adapters)}"
            raise InvalidRequest(Problem("is empty, and several adapters are loaded", "adapter", remedy=remedy))
        return next(iter(self), None)


@dataclass(frozen=True)
class AdapterSpec:
    """What `--adapter` says.

    Attributes:
        source: a folder or a hub id.
        tasks: the tasks to read, in the order given; None for all.
    """

    text: str
    name: str
    source: str
    tasks: tuple[str, ...] | None = None


def parse_spec(text: str) -> AdapterSpec:
    """Reads `[NAME=]CKPT[@task+task]`. A path may itself hold `=` or `@`: a name or a task never holds a `/`.

    Without NAME, the last part of CKPT is the name.

    Raises:
        ConfigError: a name that cannot be one, no CKPT, a task twice.
    """
    field = f"--adapter {text}"
    before, equals, rest = text.partition("=")
    name, source = (before, rest) if equals and "/" not in before else ("", text)
    tasks: tuple[str, ...] | None = None
    head, at, tail = source.rpartition("@")
    problems = []
    if at and "/" not in tail:
        source, tasks = head, tuple(part.strip() for part in tail.split("+"))
        bad = [task for task in tasks if not NAME_PATTERN.fullmatch(task)]
        if bad:
            problems.append(Problem(f"{', '.join(map(repr, bad))} is no task name", field, remedy=_REMEDY))
        elif len(set(tasks)) < len(tasks):
            problems.append(Problem("names a task twice", field, remedy="name each task once"))
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
    return AdapterSpec(text, name, source, tasks)


def _last_part(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.is_dir() else source.rstrip("/").rpartition("/")[2]


def open_adapter(spec: AdapterSpec, model_folder: Path, allow_other_base: bool = False) -> ServedAdapter:
    """`open_folder` for what `--adapter` says.

    Raises:
        ConfigError: also where it is neither a folder nor a checkpoint that the hub gives.
    """
    return open_folder(spec.name, _folder(spec), spec.tasks, model_folder, allow_other_base)


def open_folder(
    name: str,
    folder: Path,
    tasks: Sequence[str] | None,
    model_folder: Path,
    allow_other_base: bool = False,
    model: BaseModel | None = None,
) -> ServedAdapter:
    """Reads and checks one checkpoint: every byte of the chosen tasks, A of every module, the base model.

    Args:
        tasks: the tasks to read; None for all.
        model: what `loraf.base_model.describe` says of the model, if that is known.

    Raises:
        CheckpointError, CorruptCheckpoint, BaseMismatch, UnknownTask: it cannot be served; nothing is kept of it.
        ConfigError: it holds no task.
    """
    checkpoint = Checkpoint.open(folder, tasks)
    require_servable(checkpoint.manifest, folder, model_folder, allow_other_base, model)
    checkpoint.verify_projection()
    return ServedAdapter(name, folder, checkpoint.manifest, checkpoint)


def require_servable(
    manifest: Manifest, folder: Path, model_folder: Path, allow_other_base: bool, model: BaseModel | None
) -> None:
    """What the manifest alone tells. Arguments and errors as of `open_folder`."""
    if not manifest.tasks:
        remedy = "serve a checkpoint in which a task has been trained"
        raise ConfigError(Problem("holds no task", file=str(folder), remedy=remedy))
    if not allow_other_base:
        require_same_base(manifest.base_model, model_folder, folder, model)


def open_all(texts: Sequence[str], model_folder: Path, allow_other_base: bool = False) -> Registry:
    """Every `--adapter` of the command line.

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
            adapters[spec.name] = open_adapter(spec, model_folder, allow_other_base)
        except LorafError as error:
            problems += [p if p.file or p.field.startswith("--") else replace(p, field=field) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return Registry(adapters.values())


def _folder(spec: AdapterSpec) -> Path:
    """The checkpoint's folder; from the hub only the manifest and the chosen tasks' files are downloaded."""
    local = Path(spec.source).expanduser()
    if local.is_dir():
        return local.resolve()
    field = f"--adapter {spec.text}"
    if not HUB_ID.fullmatch(spec.source):
        remedy = "name a folder written by `loraf-train run`, or a hub id such as org/adapter"
        raise ConfigError(Problem(f"there is no checkpoint {spec.source!r}", field, remedy=remedy))
    import huggingface_hub  # only here: most uses never reach a hub

    files = ["tasks/*.safetensors"] if spec.tasks is None else [f"tasks/{task}.safetensors" for task in spec.tasks]
    try:
        return Path(huggingface_hub.snapshot_download(spec.source, allow_patterns=[FILE_NAME, *files]))
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated, offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{spec.source} is no folder here, and cannot be had from the hub ({reason})"
        remedy = "check the name, log in with `hf auth login` if it is private, or name a local folder"
        raise ConfigError(Problem(message, field, remedy=remedy)) from None
