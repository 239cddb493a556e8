"""Finished runs on disk, so that a comparison that was interrupted goes on with what is missing.

    <out>/runs/<name>.json        the run, all that it depends on, and a digest of both

A run counts only if all that it depends on is what it was: settings, examples, base model, precision, versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraf import strict_json
from loraf.checkpoint import unwritable, write_durably
from loraf_train.compare.results import Run
from loraf_train.recorded import differences, said

FOLDER = "runs"
_FORMAT, _VERSION = "loraf-compare-run", 1


def path_of(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.json"


def keep(file: Path, making: Mapping[str, Any], run: Run) -> None:
    """Args: making: all that the run depends on, as plain JSON. Raises CheckpointError where the disk refuses."""
    content = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "making": dict(making),
        "run": dataclasses.asdict(run),
    }
    content = strict_json.plain(content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file.parent, error) from error
    write_durably(file, strict_json.dumps(content | {"digest": _digest(content)}, indent=1) + b"\n")


def find(file: Path, making: Mapping[str, Any]) -> tuple[Run | None, str]:
    """The run in `file` if it was made so, or None and why it is of no use (nothing to say: there is none)."""
    if not file.exists():
        return None, ""
    try:
        content = strict_json.loads(file.read_bytes())
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise ValueError("it does not match its digest")
        if content["format_version"] != _VERSION:
            raise ValueError("another release of loraf wrote it")
        faults: list[str] = []
        run = strict_json.build(Run, content["run"], "run", lambda where, text: faults.append(f"{where} {text}"))
        if run is None:
            raise ValueError("; ".join(faults))
    except (OSError, ValueError, KeyError) as error:
        return None, f"{file} is of no use ({error})"
    changes = [
        f"{field} changed" if field.split(".")[0] in _DIGESTS else f"{field} was {said(was)}, is {said(now)}"
        for field, was, now in differences(content["making"], strict_json.plain(making))
    ]
    return (None, "; ".join(changes)) if changes else (run, "")


_DIGESTS = ("examples", "evaluation", "general", "base")


def _digest(content: Any) -> str:
    return hashlib.sha256(strict_json.dumps(content, sort_keys=True)).hexdigest()
