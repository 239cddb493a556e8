"""Checkpoints by name: a folder here, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from loraf.errors import ConfigError, Problem
from loraf.manifest import FILE_NAME

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_FILES = (FILE_NAME, "tasks/*.safetensors")


def checkpoint_folder(source: str | Path, revision: str | None = None, field: str = "CKPT") -> Path:
    """The folder of a checkpoint; one of the hub is downloaded into the hub's cache, which nothing may write to.

    Args:
        source: a folder, or `org/name`. A folder of that name comes first.
        revision: a branch, tag or commit of the hub.

    Raises:
        ConfigError: it is neither.
    """
    if Path(source).is_dir() or not HUB_ID.fullmatch(str(source)):
        return Path(source)  # reading the manifest says best what is wrong with it
    import huggingface_hub  # only here: most uses never reach a hub

    try:
        found = huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=list(CHECKPOINT_FILES))
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated, offline
        message = f"{source} is no folder here, and cannot be had from the hub ({reason(error)})"
        remedy = "check the name, log in with `hf auth login` if it is private, or name a folder"
        raise ConfigError(Problem(message, field, remedy=remedy)) from None
    return Path(found)


def reason(error: Exception) -> str:
    """An error of the hub's client in one line."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
