"""The adapters that requests may name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from loraf.errors import Problem, UnknownTask
from loraf_serve.adapters.named_sets import NamedSet, OperatorSets
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest


class Registry:
    """Adapters by name, in the order they were given. Immutable: a request sees the same adapters to its end.

    Args:
        operator_sets: the named sets of the server's command line, which hold for adapters that come later too.
        tasks: the only tasks of which named sets may consist; None for all.
    """

    def __init__(
        self,
        adapters: Iterable[ServedAdapter] = (),
        operator_sets: OperatorSets | None = None,
        tasks: frozenset[str] | None = None,
    ):
        self._tasks = tasks
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self.operator_sets = OperatorSets() if operator_sets is None else operator_sets
        self._sets: dict[str, dict[str, NamedSet]] = {}  # by adapter, filled in as they are asked for

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter(tuple(self._adapters.values()))

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def with_adapter(self, adapter: ServedAdapter) -> Registry:
        """A copy in which the adapter's name means `adapter`. A name that is already there keeps its place."""
        return Registry((self._adapters | {adapter.name: adapter}).values(), self.operator_sets, self._tasks)

    def without(self, name: str) -> Registry:
        """A copy without one name."""
        return Registry((adapter for adapter in self if adapter.name != name), self.operator_sets, self._tasks)

    def with_sets(self, operator_sets: OperatorSets) -> Registry:
        """A copy with other named sets of the operator."""
        return Registry(self, operator_sets, self._tasks)

    def limited_to(self, tasks: frozenset[str] | None, adapters: frozenset[str] | None = None) -> Registry:
        """A copy for a client that may use these tasks and adapters only; None for all."""
        if tasks is None and adapters is None:
            return self
        seen = (adapter for adapter in self if adapters is None or adapter.name in adapters)
        return Registry(seen, self.operator_sets, tasks)

    def is_hidden(self, task: str) -> bool:
        """Whether the client may not know of a task of this name."""
        return self._tasks is not None and task not in self._tasks

    def sets_of(self, adapter: ServedAdapter) -> Mapping[str, NamedSet]:
        """The named sets of an adapter, by name, in alphabetical order."""
        if self._adapters.get(adapter.name) is not adapter:  # replaced in the meantime
            return self._sets_now(adapter)
        if adapter.name not in self._sets:
            self._sets[adapter.name] = self._sets_now(adapter)
        return self._sets[adapter.name]

    def _sets_now(self, adapter: ServedAdapter) -> dict[str, NamedSet]:
        sets = self.operator_sets.of(adapter)
        return {name: named for name, named in sets.items() if not any(map(self.is_hidden, named.task_set.names))}

    def named(self, digest: str) -> tuple[str, ...]:
        """All names of the content with this adapter digest."""
        return tuple(adapter.name for adapter in self if adapter.digest == digest)

    def get(self, name: str, field: str = "name") -> ServedAdapter:
        """Raises UnknownTask, which lists the names there are, for `field`."""
        if name not in self._adapters:
            message = f"there is no adapter {name!r}" if name else "no adapter is named"
            raise UnknownTask(Problem(message, field, remedy=f"choose from: {', '.join(self._adapters) or 'none'}"))
        return self._adapters[name]

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter that a request means. The empty name means the only one; None if none is loaded.

        Raises:
            UnknownTask: there is no adapter of that name.
            InvalidRequest: the name is empty and several adapters are loaded.
        """
        if name:
            return self.get(name, "adapter")
        if len(self) > 1:
            remedy = f"choose from: {', '.join(self._adapters)}"
            raise InvalidRequest(Problem("is empty, and several adapters are loaded", "adapter", remedy=remedy))
        return next(iter(self), None)
