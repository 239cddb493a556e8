"""Finished runs on disk, so that an interrupted comparison continues with the runs that are missing.

    <folder>/runs/<name>.json     the run, its provenance, and a digest of both

A stored run counts only if its provenance is unchanged: settings, examples, base model, precision, versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraf.checkpoint import unwritable, write_durably
from loraf.files import strict_json
from loraf.files.sealed_json import seal, unseal
from loraf_train.compare.results import Run
from loraf_train.sequence.provenance import differences, value_text

FOLDER = "runs"
_SEAL = "loraf-compare-run", 1
_PROVENANCE = "making"  # its key in the file
# Entries whose values would tell a reader nothing.
_DIGESTS = ("examples", "evaluation", "general", "base", "base_text")


def path_of(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def keep(file: Path, provenance: Mapping[str, Any], run: Run) -> None:
    """Writes a finished run.

    Args:
        provenance: everything that the run depends on, as plain JSON.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file.parent, error) from error
    write_durably(file, seal(*_SEAL, {_PROVENANCE: dict(provenance), "run": dataclasses.asdict(run)}))


def find(file: Path, provenance: Mapping[str, Any]) -> tuple[Run | None, str]:
    """Returns (run, "") if `file` holds a run of this provenance, else (None, why not); "" if there is no file."""
    if not file.exists():
        return None, ""
    try:
        content, _ = unseal(file.read_bytes(), *_SEAL)
        faults: list[str] = []
        run = strict_json.build(Run, content["run"], "run", lambda where, text: faults.append(f"{where} {text}"))
        if run is None:
            raise ValueError("; ".join(faults))
    except (OSError, ValueError, KeyError) as error:
        return None, f"{file} is not usable ({error})"
    changes = [
        f"{field} changed"
        if field.split(".")[0] in _DIGESTS
        else f"{field} was {value_text(before)}, is {value_text(now)}"
        for field, before, now in differences(content[_PROVENANCE], strict_json.plain(provenance))
    ]
    return (None, "; ".join(changes)) if changes else (run, "")
