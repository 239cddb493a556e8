"""Which checkpoint and task set a path or a model name of a stock `vllm serve` stands for. Does not import vLLM.

    --lora-modules math=./ckpt@math           one task set as a model
    --lora-modules ckpt=./ckpt                all tasks; any other set as the model `ckpt@SET`
    SET: math · math+nlu · math:0.5+nlu · as_trained=nlu · all · base · a named set of the checkpoint

A task's name cannot contain `=`, `:`, `+` or `@`, so every SET has one reading.

Here only the manifest is read, and the task files' presence and size are checked. Each worker reads and hashes their
contents once. A name keeps standing for what the folder contained then. A new name for a folder with other contents is
refused.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from loraf import base_model, manifest
from loraf.errors import CheckpointError, ConfigError, LorafError, Problem
from loraf.hub import split_revision
from loraf.manifest import FILE_NAME, Manifest
from loraf_serve.adapters.adapter_spec import AdapterSpec, check_adapter
from loraf_serve.adapters.checkpoint_folder import read_values
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.vllm.naming import SCHEME

ALLOW_OTHER_BASE = "LORAF_ALLOW_OTHER_BASE"  # environment variable, in place of loraf-serve's --allow-other-base
EVERY_TASK = "all"
_REMEDY = "write CKPT or CKPT@SET, for example ./ckpt@math+nlu"
# Advice in loraf-serve's messages → advice for this server.
_ADVICE = {
    "pass --allow-other-base": f"set {ALLOW_OTHER_BASE}=1",
    "serve it with --backend merged": "serve it with loraf-serve --backend merged",
}


def split_path(path: str) -> tuple[str, str] | None:
    """Splits a LoRA path into checkpoint and task set. Returns None if it is not a LoRAF checkpoint's path.

    A folder with a checkpoint is one, and so is any text followed by `@` and a set. A checkpoint on the hub is named
    `org/name@all`, or `org/name#REVISION@all`. A path that exists is never split.

    Raises:
        ConfigError: there is no text before or after the `@`, or the path begins with the reserved `loraf:`.
    """
    if path.startswith(f"{SCHEME}:"):
        message = f"begins with '{SCHEME}:', which is reserved for the server itself"
        raise ConfigError(Problem(message, _field(path), remedy=_REMEDY))
    whole = Path(path).expanduser()
    if whole.is_dir():
        return (path, EVERY_TASK) if (whole / FILE_NAME).is_file() else None
    checkpoint, at, text = path.rpartition("@")
    if not at or "/" in text:
        return None
    if not checkpoint or not text:
        message = "names no checkpoint" if not checkpoint else "names no task set after the '@'"
        raise ConfigError(Problem(message, _field(path), remedy=_REMEDY))
    return checkpoint, text


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint that names of this server stand for. Its manifest has been checked.

    Attributes:
        folder: absolute, with links resolved.
        digest: the adapter digest of all its tasks.
        manifest: as first read.
    """

    folder: Path
    digest: str
    manifest: Manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.manifest.task_names

    def require_unchanged(self) -> None:
        """Reads the folder's manifest again. Tasks added since are accepted, but not served.

        Raises:
            CheckpointError: these tasks have changed, or the folder is no longer a checkpoint.
        """
        current = manifest.read(self.folder)
        same = set(self.tasks) <= set(current.task_names) and current.only(self.tasks).adapter_digest == self.digest
        if not same:
            message = "was changed since this server read it, so old and new names would stand for different contents"
            remedy = "put the new checkpoint into another folder, or restart the server"
            raise CheckpointError(Problem(message, file=str(self.folder), remedy=remedy))

    def verify_contents(self) -> None:
        """Reads and hashes the task files in this process and forgets their values. Takes seconds.

        The workers do not read a copy of a checkpoint that they hold, but damage must be found all the same.

        Raises:
            CorruptCheckpoint: as `read_values`.
        """
        read_values(ServedAdapter(self.folder.name, self.folder, self.manifest))


class StockCheckpoints:
    """The checkpoints of one server, by folder.

    Args:
        model: the served model, a folder or a hub id.
        revision: of the model on the hub.
        max_rank: the engine's largest rank.
    """

    def __init__(self, model: str, revision: str | None, max_rank: int):
        self._model, self._revision = model, revision
        self._max_rank = max_rank
        self._checkpoints: dict[Path, NamedCheckpoint] = {}

    def check(self, name: str) -> NamedCheckpoint:
        """Finds a checkpoint (a folder, a hub id, or `org/name#REVISION`) and checks all that can be checked without
        reading a task file: the manifest, the files' presence and size, the base model, the rank. Takes seconds.
        Thread-safe.

        Raises:
            LorafError: it cannot be served, or was changed since the workers read it.
        """
        known = self._checkpoints.get(Path(name).expanduser().resolve())
        if known is not None:
            known.require_unchanged()
            return known
        try:
            folder = base_model.resolve(self._model, self._revision, field="the served model")
            source, revision = split_revision(name, f"--adapter {name}")
            spec = AdapterSpec(name, "", source, revision=revision)
            adapter = check_adapter(spec, folder, os.environ.get(ALLOW_OTHER_BASE) == "1")
        except LorafError as error:
            raise for_vllm_serve(error, name) from None
        rank = adapter.manifest.rank
        if rank > self._max_rank:
            message = f"rank {rank} is beyond the engine's largest, {self._max_rank}"
            remedy = "start the server with a larger --max-lora-rank"
            raise CheckpointError(Problem(message, "rank", str(adapter.path), remedy))
        known = self._checkpoints.get(adapter.path)
        if known is not None:
            known.require_unchanged()
            return known
        return NamedCheckpoint(adapter.path, adapter.digest, adapter.manifest)

    def is_kept(self, checkpoint: NamedCheckpoint) -> bool:
        """Whether the folder's contents have been read."""
        return checkpoint.folder in self._checkpoints

    def keep(self, checkpoint: NamedCheckpoint) -> None:
        """From now on the folder stands for this content. Call it once the contents have been read and verified."""
        self._checkpoints.setdefault(checkpoint.folder, checkpoint)


def for_vllm_serve(error: LorafError, path: str) -> LorafError:
    """Rewords an error for a user of `vllm serve`, who has none of loraf-serve's options."""
    problems = []
    for problem in error.problems:
        remedy = problem.remedy
        for loraf_serve_advice, advice in _ADVICE.items():
            remedy = remedy.replace(loraf_serve_advice, advice)
        field = _field(path) if problem.field.startswith("--adapter") else problem.field
        problems.append(dataclasses.replace(problem, field=field, remedy=remedy))
    return type(error)(problems)


def _field(path: str) -> str:
    return f"LoRA path {path!r}"
