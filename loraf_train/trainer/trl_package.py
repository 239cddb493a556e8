"""Whether TRL is there, which `preference` needs. It is an extra, and looked for without importing it or torch."""

from __future__ import annotations

import importlib.util

from loraf.errors import Problem


def missing(field: str, file: str) -> list[Problem]:
    """Reports that TRL is not installed.

    Args:
        field, file: where dpo is asked for.
    """
    if importlib.util.find_spec("trl"):
        return []
    message = "dpo needs the package 'trl', which is not installed"
    return [Problem(message, field, file, "`pip install 'loraf[trl]'`, or use objective: sft")]
