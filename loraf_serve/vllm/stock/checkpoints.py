"""Which checkpoint and which task set a path or a model name of a stock `vllm serve` means. Knows no vLLM.

    --lora-modules math=./ckpt@math           one set under a name of its own
    --lora-modules ckpt=./ckpt                all tasks; and any other set by the model name `ckpt@SET`
    SET: math · math+nlu · math:0.5+nlu · as_trained=nlu · all · base

No task's name can hold `=`, `:`, `+` or `@`, so that every SET has one reading.

A checkpoint is read whole and once: what a name means stays what the folder held when the server first read it. A new
name on a folder that holds something else by now is refused.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from loraf import base_model, manifest
from loraf.errors import CheckpointError, ConfigError, LorafError, Problem
from loraf.manifest import FILE_NAME, Manifest
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import AdapterSpec, open_adapter
from loraf_serve.vllm.naming import SCHEME

ALLOW_OTHER_BASE = "LORAF_ALLOW_OTHER_BASE"  # the variable that stands for loraf-serve's --allow-other-base
EVERY_TASK = "all"
_AS_TRAINED = "as_trained="
_REMEDY = "write CKPT or CKPT@SET, for example ./ckpt@math+nlu"
# What loraf-serve's messages advise → what to do here.
_ADVICE = {
    "say --allow-other-base": f"set {ALLOW_OTHER_BASE}=1",
    "serve it with --backend merged": "serve it with loraf-serve --backend merged",
}


def split_path(path: str) -> tuple[str, str] | None:
    """(checkpoint, set) that a LoRA path names; None if it is no LoRAF checkpoint's.

    A folder that holds a checkpoint is one, and so is whatever is followed by `@` and a set: a checkpoint on the hub
    is named `org/name@all`. A path that exists is never taken apart.

    Raises:
        ConfigError: nothing before or after the `@`, or a name that only this server may give.
    """
    if path.startswith(f"{SCHEME}:"):
        raise ConfigError(Problem("is what the server itself calls a task set", _field(path), remedy=_REMEDY))
    whole = Path(path).expanduser()
    if whole.is_dir():
        return (path, EVERY_TASK) if (whole / FILE_NAME).is_file() else None
    source, at, text = path.rpartition("@")
    if not at or "/" in text:
        return None
    if not source or not text:
        message = "names no checkpoint" if not source else "names no task set after the '@'"
        raise ConfigError(Problem(message, _field(path), remedy=_REMEDY))
    return source, text


def read_set(text: str, manifest: Manifest) -> TaskSet:
    """The canonical set that `text` names: as `TaskSet.parse`, or `as_trained=TASK`.

    Raises:
        SelectionError, UnknownTask: as `TaskSet.parse` and `Manifest.as_trained`.
    """
    if text.startswith(_AS_TRAINED):
        return manifest.as_trained(text.removeprefix(_AS_TRAINED))
    return TaskSet.parse(text, manifest.task_names)


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read and verified.

    Attributes:
        folder: absolute, links resolved.
        digest: the adapter digest of all its tasks.
        manifest: as it was read.
    """

    folder: Path
    digest: str
    manifest: Manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.manifest.task_names

    def require_unchanged(self) -> None:
        """Reads the folder's manifest again. Tasks that were added since do no harm; they are not served.

        Raises:
            CheckpointError: the folder holds other contents under these tasks' names, or no checkpoint any more.
        """
        now = manifest.read(self.folder)
        same = set(self.tasks) <= set(now.task_names) and now.only(self.tasks).adapter_digest == self.digest
        if not same:
            message = "was changed since this server read it, so that a new name would mean something else than the old"
            remedy = "put the new checkpoint into another folder, or start the server again"
            raise CheckpointError(Problem(message, file=str(self.folder), remedy=remedy))


class StockCheckpoints:
    """The checkpoints of one server, by folder.

    Args:
        model, revision: the served model, as the server knows it: a folder or a hub id.
        max_rank: the engine's largest.
    """

    def __init__(self, model: str, revision: str | None, max_rank: int):
        self._model, self._revision = model, revision
        self._max_rank = max_rank
        self._sources: dict[Path, Source] = {}

    def read(self, name: str) -> Source:
        """Reads a checkpoint (a folder or a hub id) and checks everything about it that can be checked outside of the
        engine: every byte, A, the base model, the rank. Takes seconds; may run in any thread.

        Raises:
            LorafError: it cannot be served, or it was changed since it was first read.
        """
        known = self._sources.get(Path(name).expanduser().resolve())
        if known is not None:
            known.require_unchanged()
            return known
        try:
            folder = base_model.resolve(self._model, self._revision, field="the served model")
            opened = open_adapter(AdapterSpec(name, "", name), folder, os.environ.get(ALLOW_OTHER_BASE) == "1")
        except LorafError as error:
            raise in_these_words(error, name) from None
        found = opened.checkpoint.manifest
        if found.rank > self._max_rank:
            message = f"rank {found.rank} is beyond the engine's largest, {self._max_rank}"
            remedy = "start the server with a larger --max-lora-rank"
            raise CheckpointError(Problem(message, "rank", str(opened.path), remedy))
        known = self._sources.get(opened.path)
        if known is not None:
            known.require_unchanged()
            return known
        return Source(opened.path, opened.digest, found)

    def keep(self, source: Source) -> None:
        """From now on the folder means this content. Called once the engine has it."""
        self._sources.setdefault(source.folder, source)


def in_these_words(error: LorafError, path: str) -> LorafError:
    """The same error for a user of `vllm serve`, who has none of loraf-serve's options."""
    problems = []
    for problem in error.problems:
        remedy = problem.remedy
        for theirs, ours in _ADVICE.items():
            remedy = remedy.replace(theirs, ours)
        field = _field(path) if problem.field.startswith("--adapter") else problem.field
        problems.append(dataclasses.replace(problem, field=field, remedy=remedy))
    return type(error)(problems)


def _field(path: str) -> str:
    return f"LoRA path {path!r}"
