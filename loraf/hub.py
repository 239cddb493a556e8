"""Checkpoints by name: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from loraf.errors import ConfigError, Problem, one_line
from loraf.manifest import FILE_NAME

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_folder(
    source: str | Path, revision: str | None = None, field: str = "CKPT", tasks: Sequence[str] | None = None
) -> Path:
    """Returns the folder of a checkpoint. A hub repository is downloaded into the hub's cache, which is read-only.

    Args:
        source: a folder, or `org/name`. A folder of that name wins.
        revision: a branch, tag or commit on the hub.
        field: for error messages.
        tasks: on the hub, download only these tasks' files (None: all).

    Raises:
        ConfigError: `source` looks like a hub id and could not be downloaded.
    """
    if Path(source).is_dir() or not HUB_ID.fullmatch(str(source)):
        return Path(source)  # reading the manifest gives the best error message
    files = ["tasks/*.safetensors"] if tasks is None else [f"tasks/{task}.safetensors" for task in tasks]
    return download(str(source), [FILE_NAME, *files], revision=revision, field=field)


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
        message = f"{repository} is not a local folder and could not be downloaded from the hub ({one_line(error)})"
        remedy = "check the name, log in with `hf auth login` if it is private or gated, or name a local folder"
        raise ConfigError(Problem(message, field, file, remedy)) from None
    return Path(folder)
