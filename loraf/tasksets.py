"""Task sets: which tasks of a checkpoint are active, and with which weights.

A set is literal: `nlu` means the values of nlu alone. In canonical form, tasks are in the order of the checkpoint,
tasks of weight 0 are left out, and the empty set is the base model. Equal canonical sets have the same effect, so the
canonical text (`math+nlu`, `math:0.5+nlu`, `base`) identifies a set in caches and in responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraf.errors import Problem, SelectionError, UnknownTask

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
RESERVED_NAMES = frozenset({"all", "base"})
MAX_WEIGHT = 16.0
_SHOWN = 100  # characters of a name that is none


def name_problem(name: str, kind: str = "task", *, field: str = "name", file: str = "") -> Problem | None:
    """Returns what is wrong with `name` as the name of a task, adapter or named set (`kind`), or None."""
    if name in RESERVED_NAMES:
        return Problem(f"{name!r} is reserved", field, file, f"choose a {kind} name other than 'all' and 'base'")
    if not NAME_PATTERN.fullmatch(name):
        return Problem(
            f"{name[:_SHOWN]!r} is not a valid {kind} name",
            field,
            file,
            "use 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit",
        )
    return None


def _number(text: str) -> float:
    """Raises ValueError: it is no number as JSON writes one. Python also reads 1_0, and digits of any script."""
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return float(text)


def read_pairs(text: str) -> tuple[list[tuple[str, float]], list[Problem]]:
    """Splits `math:0.5+nlu` into names and weights, and lists the weights that are not numbers. Checks no name."""
    pairs: list[tuple[str, float]] = []
    problems: list[Problem] = []
    for i, part in enumerate(text.split("+")):
        name, colon, weight = (piece.strip() for piece in part.partition(":"))
        try:
            pairs.append((name, _number(weight) if colon else 1.0))
        except ValueError:
            pairs.append((name, 1.0))  # so that the name is checked too
            remedy = "write name:number, for example math:0.5"
            problems.append(Problem(f"weight {weight!r} is not a number", f"tasks[{i}].weight", remedy=remedy))
    return pairs, problems


@dataclass(frozen=True)
class TaskSet:
    """A canonical task set: (task name, weight) pairs in checkpoint order, no weight 0. Empty: the base model."""

    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float] | Iterable[tuple[str, float]], order: Sequence[str]) -> TaskSet:
        """Returns the canonical form of `weights`.

        Args:
            order: the tasks of the checkpoint.

        Raises:
            UnknownTask: a name is not in `order`.
            SelectionError: a duplicate name, or a weight that is not finite or beyond ±16. Lists all mistakes.
        """
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        return cls._checked(list(pairs), order, [])

    @classmethod
    def parse(cls, text: str, order: Sequence[str]) -> TaskSet:
        """Parses `math`, `math:0.5+nlu`, `all` or `base`. What people write may be more, see `loraf.set_text`.

        Raises:
            SelectionError, UnknownTask: see `of`; also if a weight is not a number. Lists all mistakes.
        """
        if text == "base":
            return cls()
        if text == "all":
            return cls.of(dict.fromkeys(order, 1.0), order)
        pairs, problems = read_pairs(text)
        return cls._checked(pairs, order, problems)

    @classmethod
    def _checked(cls, pairs: list[tuple[str, float]], order: Sequence[str], problems: list[Problem]) -> TaskSet:
        """Raises the mistakes of `pairs`, together with the earlier ones in `problems`."""
        unknown: list[Problem] = []
        seen: dict[str, float] = {}
        names = frozenset(order)
        for i, (name, weight) in enumerate(pairs):
            where = f"tasks[{i}]"
            if name not in names:
                known = ", ".join(order) or "none"
                unknown.append(Problem(f"there is no task {name!r}", f"{where}.name", remedy=f"choose from: {known}"))
            elif name in seen:
                problems.append(Problem(f"task {name!r} is named twice", f"{where}.name", remedy="name each task once"))
            if not abs(weight) <= MAX_WEIGHT:  # false for NaN too
                remedy = f"use a finite weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
                problems.append(Problem(f"weight {weight} is out of range", f"{where}.weight", remedy=remedy))
            seen[name] = weight
        if problems:
            raise SelectionError(problems + unknown)
        if unknown:
            raise UnknownTask(unknown)
        return cls(tuple((name, float(seen[name])) for name in order if seen.get(name, 0.0) != 0.0))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.weights)

    @property
    def is_base(self) -> bool:
        return not self.weights

    def __str__(self) -> str:
        """The canonical text, from which `parse` returns the same set."""
        return "+".join(n if w == 1.0 else f"{n}:{w!r}" for n, w in self.weights) or "base"
