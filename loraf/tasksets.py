"""Task sets: which tasks of a checkpoint act, and how strongly.

A set is literal: `nlu` is nlu's values alone. In canonical form tasks stand in the order of the checkpoint, a task of
weight 0 is left out, and the empty set is the base model. Canonical sets that are equal act equally, so the canonical
text (`math+nlu`, `math:0.5+nlu`, `base`) can name a set in caches and in answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraf.errors import Problem, SelectionError, UnknownTask

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
RESERVED_NAMES = frozenset({"all", "base"})
MAX_WEIGHT = 16.0


def name_problem(name: str, what: str = "task", *, field: str = "name", file: str = "") -> Problem | None:
    """What is wrong with `name` as a task or adapter name, or None."""
    if name in RESERVED_NAMES:
        return Problem(f"{name!r} is taken", field, file, f"choose a {what} name other than 'all' and 'base'")
    if not NAME_PATTERN.fullmatch(name):
        return Problem(
            f"{name!r} is no {what} name",
            field,
            file,
            "use 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit",
        )
    return None


@dataclass(frozen=True)
class TaskSet:
    """A canonical task set: (task name, weight) pairs in checkpoint order, no weight 0. Empty: the base model."""

    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float] | Iterable[tuple[str, float]], order: Sequence[str]) -> TaskSet:
        """The canonical form of `weights`, for a checkpoint whose tasks are `order`.

        Raises:
            UnknownTask: a name is not in `order`.
            SelectionError: a name twice, or a weight that is not finite or beyond ±16. All mistakes at once.
        """
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        return cls._checked(list(pairs), order, [])

    @classmethod
    def parse(cls, text: str, order: Sequence[str]) -> TaskSet:
        """The set that `text` names: `math`, `math:0.5+nlu`, `all` or `base`.

        Raises:
            SelectionError, UnknownTask: as `of`; also a weight that is no number. All mistakes at once.
        """
        if text == "base":
            return cls()
        if text == "all":
            return cls.of(dict.fromkeys(order, 1.0), order)
        pairs: list[tuple[str, float]] = []
        problems: list[Problem] = []
        for i, part in enumerate(text.split("+")):
            name, colon, weight = (piece.strip() for piece in part.partition(":"))
            try:
                pairs.append((name, float(weight) if colon else 1.0))
            except ValueError:
                pairs.append((name, 1.0))  # so that the name is looked at too
                remedy = "write name:number, for example math:0.5"
                problems.append(Problem(f"{weight!r} is no weight", f"tasks[{i}].weight", remedy=remedy))
        return cls._checked(pairs, order, problems)

    @classmethod
    def _checked(cls, pairs: list[tuple[str, float]], order: Sequence[str], problems: list[Problem]) -> TaskSet:
        """`problems`: mistakes that were found before."""
        unknown: list[Problem] = []
        seen: dict[str, float] = {}
        for i, (name, weight) in enumerate(pairs):
            where = f"tasks[{i}]"
            if name not in order:
                have = ", ".join(order) or "none"
                unknown.append(Problem(f"there is no task {name!r}", f"{where}.name", remedy=f"choose from: {have}"))
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
        """The canonical text; `parse` gives the same set back."""
        return "+".join(n if w == 1.0 else f"{n}:{w!r}" for n, w in self.weights) or "base"
