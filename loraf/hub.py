"""Checkpoints by name: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from loraf.errors import ConfigError, Problem, one_line
from loraf.manifest import FILE_NAME

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(text: str, field: str = "CKPT") -> tuple[str, str | None]:
    """Splits `org/name#REVISION` into the hub id and its revision. Other text is returned whole, with None.

    A folder may have a `#` in its name.

    Args:
        field: for error messages.

    Raises:
        ConfigError: the revision is malformed, or is one of a local folder.
    """
    source, mark, revision = text.partition("#")
    folder = Path(source).expanduser()
    if not mark or Path(text).expanduser().is_dir() or not (folder.is_dir() or HUB_ID.fullmatch(source)):
        return text, None
    problem = revision_problem(revision, field)
    if folder.is_dir():
        problem = local_revision(source, field)
    if problem:
        raise ConfigError(problem)
    return source, revision


def revision_problem(revision: str, field: str) -> Problem | None:
    """Returns what is wrong with the text of a revision, or None."""
    parts = revision.split("/")
    if revision.isprintable() and " " not in revision and not {"", ".", ".."} & set(parts):
        return None
    remedy = "name a branch, a tag or a commit of the repository, for example main"
    return Problem(f"{revision!r} is not a revision", field, remedy=remedy)


def local_revision(source: str, field: str) -> Problem:
    """Returns the problem that a revision was named for something that is not on the hub."""
    remedy = "leave the revision out, or name a repository on the hub"
    return Problem(f"{source} is a local folder, which has no revisions", field, remedy=remedy)


def loaded_from_hub(folder: Path) -> str:
    """Returns `org/name at COMMIT` if a folder is a snapshot in the hub's cache, or "" otherwise."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name) or not repository.startswith("models--"):
        return ""
    return f"{repository.removeprefix('models--').replace('--', '/')} at {folder.name}"


def public_name(folder: Path) -> str:
    """Returns what others may see of a model's folder: the hub id of a snapshot in the hub's cache, or its own name."""
    return loaded_from_hub(folder).partition(" ")[0] or folder.name


def checkpoint_folder(
    source: str | Path,
    revision: str | None = None,
    field: str = "CKPT",
    tasks: Sequence[str] | None = None,
    statistics: bool = False,
) -> Path:
    """Returns the folder of a checkpoint. A hub repository is downloaded into the hub's cache, which is read-only.

    Args:
        source: a folder, or `org/name`, or `org/name#REVISION`. A folder of that name wins.
        revision: a branch, tag or commit on the hub, in place of one in `source`.
        field: for error messages.
        tasks: on the hub, download only these tasks' files (None: all).
        statistics: on the hub, download the files with the tasks' statistics too, which only training uses.

    Raises:
        ConfigError: `source` looks like a hub id and could not be downloaded; or its revision is malformed, or is one
            of a local folder.
    """
    source, named = split_revision(str(source), field)
    revision = revision or named
    if Path(source).is_dir() or not HUB_ID.fullmatch(source):
        return Path(source)  # reading the manifest gives the best error message
    files = ["tasks/*.safetensors"] if tasks is None else [f"tasks/{task}.safetensors" for task in tasks]
    files += ["statistics/*.safetensors"] if statistics else []
    return download(source, [FILE_NAME, *files], revision=revision, field=field)


def download(
    repository: str,
    files: Sequence[str],
    *,
    leave_out: Sequence[str] = (),
    revision: str | None = None,
    field: str = "",
    file: str = "",
) -> Path:
    """Downloads files of a hub repository into the hub's cache, and returns the folder.

    Args:
        files, leave_out: glob patterns.
        revision: a branch, tag or commit.
        field, file: for error messages.

    Raises:
        ConfigError: the download failed.
    """
    import huggingface_hub  # only here: most uses never reach a hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(files), ignore_patterns=list(leave_out) or None
        )
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated, offline
        named = f"{repository} at {revision}" if revision else repository
        message = f"{named} is not a local folder and could not be downloaded from the hub ({one_line(error)})"
        remedy = "check the name, log in with `hf auth login` if it is private or gated, or name a local folder"
        raise ConfigError(Problem(message, field, file, remedy)) from None
    return Path(folder)
