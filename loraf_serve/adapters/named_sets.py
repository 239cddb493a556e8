"""Task sets with a name of their own: the checkpoint's, and the operator's (`--set [ADAPTER/]NAME=SET`).

The operator's set replaces the checkpoint's of the same name, and `ADAPTER/NAME` replaces `NAME`. A set without ADAPTER
belongs to every adapter that has all of its tasks, whenever the adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraf import set_text
from loraf.errors import CheckpointError, ConfigError, Problem, SelectionError, UnknownTask
from loraf.manifest import Manifest
from loraf.set_text import SetText
from loraf.tasksets import TaskSet, name_problem
from loraf_serve.backends.backend import ServedAdapter

OPTION = "--set"
_REMEDY = "write [ADAPTER/]NAME=SET, for example support=math+nlu:0.5"


@dataclass(frozen=True)
class NamedSet:
    """A named set of one adapter.

    Attributes:
        by_operator: it was given on the server's command line, not stored in the checkpoint.
    """

    name: str
    task_set: TaskSet
    by_operator: bool


@dataclass(frozen=True)
class OperatorSet:
    """One `--set`.

    Attributes:
        option: the option as it was written, for messages.
        adapter: the only adapter that it is for; "" for every adapter that has its tasks.
    """

    option: str
    adapter: str
    name: str
    written: SetText

    def of(self, manifest: Manifest) -> TaskSet:
        """The set in a checkpoint, whose own named sets it may name. Raises UnknownTask if the checkpoint lacks some
        of it."""
        return self.written.of(manifest)


class OperatorSets:
    """The sets of the command line. Immutable."""

    def __init__(self, sets: Iterable[OperatorSet] = ()):
        # A set of one adapter comes last, so that it wins.
        self._sets = tuple(sorted(sets, key=lambda operator_set: operator_set.adapter != ""))

    @classmethod
    def parse(cls, texts: Sequence[str]) -> OperatorSets:
        """Reads the values of `--set`.

        Raises:
            ConfigError: everything that is wrong with any of them.
        """
        sets: dict[tuple[str, str], OperatorSet] = {}
        problems: list[Problem] = []
        for text in texts:
            try:
                operator_set = _parse(text)
            except ConfigError as error:
                problems += error.problems
                continue
            key = (operator_set.adapter, operator_set.name)
            if key in sets:
                message = f"the set {text.partition('=')[0].strip()!r} is given twice"
                problems.append(Problem(message, operator_set.option, remedy="give each set once"))
            sets[key] = operator_set
        if problems:
            raise ConfigError(problems)
        return cls(sets.values())

    def of(self, adapter: ServedAdapter) -> dict[str, NamedSet]:
        """The named sets of an adapter, by name, in alphabetical order."""
        manifest = adapter.manifest
        named = {name: NamedSet(name, manifest.named_set(name), False) for name in manifest.sets}
        for operator_set in self._for(adapter.name):
            try:
                named[operator_set.name] = NamedSet(operator_set.name, operator_set.of(manifest), True)
            except UnknownTask:  # this adapter does not have the set
                continue
        return dict(sorted(named.items()))

    def problems(self, adapters: Sequence[ServedAdapter], may_load: bool) -> list[Problem]:
        """What is wrong with the sets, given the adapters at start.

        Args:
            may_load: clients may load further adapters.
        """
        return [p for adapter in adapters for p in self._taken_names(adapter)] + [
            problem for operator_set in self._sets if (problem := _unfit(operator_set, adapters, may_load)) is not None
        ]

    def require_free_names(self, adapter: ServedAdapter) -> None:
        """Raises CheckpointError if a task of the adapter has the name of one of its sets."""
        problems = self._taken_names(adapter)
        if problems:
            raise CheckpointError(problems)

    def _for(self, adapter: str) -> list[OperatorSet]:
        return [operator_set for operator_set in self._sets if operator_set.adapter in ("", adapter)]

    def _taken_names(self, adapter: ServedAdapter) -> list[Problem]:
        remedy = "start the server with another name for the set"
        return [
            Problem(f"{s.name!r} is the name of a task of adapter {adapter.name!r}", s.option, remedy=remedy)
            for s in self._for(adapter.name)
            if s.name in adapter.tasks
        ]


def _parse(text: str) -> OperatorSet:
    option = f"{OPTION} {text}"
    label, equals, written = text.partition("=")
    if not equals:
        raise ConfigError(Problem("names no task set", option, remedy=_REMEDY))
    adapter, slash, name = label.strip().rpartition("/")
    checks = [name_problem(name, "set", field=option)]
    checks += [name_problem(adapter, "adapter", field=option)] if slash else []
    problems = [problem for problem in checks if problem]
    tasks = SetText("base")
    try:
        tasks = set_text.parse(written)
    except SelectionError as error:
        problems += [Problem(p.message, option, remedy=p.remedy) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return OperatorSet(option, adapter, name, tasks)


def _unfit(operator_set: OperatorSet, adapters: Sequence[ServedAdapter], may_load: bool) -> Problem | None:
    """The problem with a set that no adapter has. An adapter that is loaded later may have it only if the set is for
    an adapter that is not there, or there is none at all."""
    candidates = [adapter for adapter in adapters if operator_set.adapter in ("", adapter.name)]
    if not candidates:
        if may_load:
            return None
        names = ", ".join(adapter.name for adapter in adapters) or "none"
        message = f"there is no adapter {operator_set.adapter!r}" if operator_set.adapter else "there is no adapter"
        return Problem(message, operator_set.option, remedy=f"choose from: {names}")
    reasons = []
    for adapter in candidates:
        try:
            operator_set.of(adapter.manifest)
        except UnknownTask as error:
            reasons += [(adapter.name, problem) for problem in error.problems]
        else:
            return None
    if len(candidates) == 1:
        message, remedy = "; ".join(p.message for _, p in reasons), reasons[0][1].remedy
    else:
        message = "no adapter has all of its tasks: " + "; ".join(f"{name}: {p.message}" for name, p in reasons)
        remedy = "name tasks that one adapter has"
    return Problem(message, operator_set.option, remedy=remedy)
