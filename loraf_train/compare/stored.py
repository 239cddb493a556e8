"""Finished runs on disk, so that a comparison that was interrupted goes on with what is missing.

    <out>/runs/<name>.json        the run, all that it depends on, and a digest of both

A run counts only if all that it depends on is what it was: settings, examples, base model, precision, versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraf import strict_json
from loraf.checkpoint import unwritable, write_durably
from loraf_train.compare.results import Run
from loraf_train.sealed import seal, unseal
from loraf_train.sequence.provenance import differences, said

FOLDER = "runs"
_SEAL = "loraf-compare-run", 1


def path_of(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.json"


def keep(file: Path, making: Mapping[str, Any], run: Run) -> None:
    """Args: making: all that the run depends on, as plain JSON. Raises CheckpointError where the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file.parent, error) from error
    write_durably(file, seal(*_SEAL, {"making": dict(making), "run": dataclasses.asdict(run)}))


def find(file: Path, making: Mapping[str, Any]) -> tuple[Run | None, str]:
    """The run in `file` if it was made so, or None and why it is of no use (nothing to say: there is none)."""
    if not file.exists():
        return None, ""
    try:
        content, _ = unseal(file.read_bytes(), *_SEAL)
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
