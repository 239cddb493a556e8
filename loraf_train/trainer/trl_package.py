"""Whether TRL is there, which `preference` needs. It is an extra, and looked for without importing it or torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from loraf.errors import Problem

RELEASE = "1.16"  # `preference` relies on parts of DPOTrainer that TRL does not promise; pyproject.toml says the same


def missing(field: str, file: str) -> list[Problem]:
    """Reports that TRL is not installed, or is of another release than the one that `preference` is written for.

    Args:
        field, file: where dpo is asked for.
    """
    message = "dpo needs the package 'trl', which is not installed"
    if importlib.util.find_spec("trl"):
        try:
            version = importlib.metadata.version("trl")
        except importlib.metadata.PackageNotFoundError:
            version = "of an unknown version"
        if version.startswith(f"{RELEASE}."):
            return []
        message = f"dpo needs trl {RELEASE}, and the one that is installed is {version}"
    return [Problem(message, field, file, "`pip install 'loraf[trl]'`, or use objective: sft")]
