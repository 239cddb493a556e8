"""The free part of a manifest: `training` and `scores` of a task. Plain JSON, of which some entries are read again.

A later release may add entries, so unknown ones are kept as they are. Those that this release reads must have the type
that it writes, since nothing that reads them checks them again.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraf.files import strict_json
from loraf.limits import MAX_COUNT, MAX_NAME

Report = Callable[[str, str], None]  # called with (field, message) for every mistake
ORIGINS = ("peft", "loraf")  # of an imported task


@dataclass(frozen=True)
class _Score(strict_json.Open):
    """An entry of `scores`."""

    set: str
    evaluation: str
    metric: str
    score: float
    count: int


@dataclass(frozen=True)
class _Data(strict_json.Open):
    train: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Settings(strict_json.Open):
    """`training.settings`, of a task that `loraf-train run` trained."""

    calibration: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: _Data = _Data()


@dataclass(frozen=True)
class _Imported(strict_json.Open):
    """`training.imported`, without its entry `from`, which is a keyword of Python."""

    source: str
    taken_over: bool
    error: float


@dataclass(frozen=True)
class _Training(strict_json.Open):
    examples: int = 0
    steps: int = 0
    settings: _Settings | None = None
    imported: _Imported | None = None


def check_training(training: Mapping[str, Any], where: str, report: Report) -> None:
    """Reports every entry of a task's `training` that this release could not read.

    Args:
        where: name of the field in messages.
    """
    record = strict_json.build(_Training, dict(training), where, report)
    for name in ("settings", "imported"):
        if name in training and training[name] is None:
            report(f"{where}.{name}", "is null")
    imported = training.get("imported")
    if isinstance(imported, dict) and imported.get("from") not in ORIGINS:
        report(f"{where}.imported.from", f"is not {' or '.join(map(repr, ORIGINS))}")
    if record is None:
        return
    for name in ("examples", "steps"):
        count = getattr(record, name)
        if not 0 <= count <= MAX_COUNT:
            report(f"{where}.{name}", f"{count} is out of range")
    for i, source in enumerate(record.settings.data.train if record.settings else ()):
        if isinstance(source, dict) and not isinstance(source.get("dataset", ""), str):
            report(f"{where}.settings.data.train[{i}].dataset", "is not a string")


def check_scores(scores: Sequence[Mapping[str, Any]], where: str, report: Report) -> None:
    """Reports every entry of a task's `scores` that this release could not read. `where`: as in `check_training`."""
    for i, entry in enumerate(scores):
        place = f"{where}[{i}]"
        score = strict_json.build(_Score, dict(entry), place, report)
        if score is None:
            continue
        for name in ("evaluation", "metric"):
            if not 0 < len(getattr(score, name)) <= MAX_NAME:
                report(f"{place}.{name}", f"is not a text of 1 to {MAX_NAME} characters")
        for name in ("set", "evaluation", "metric"):
            if has_controls(getattr(score, name)):
                report(f"{place}.{name}", "holds characters that cannot be shown")
        if not 0 <= score.count <= MAX_COUNT:
            report(f"{place}.count", f"{score.count} is out of range")


def has_controls(text: str) -> bool:
    """Whether a text holds control characters, with which it could steer the terminal that shows it."""
    return any(unicodedata.category(character) == "Cc" for character in text)
