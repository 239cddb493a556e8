"""The adapters that requests may name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraf.errors import Problem, UnknownTask
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest


class Registry:
    """Adapters by name, in the order they were given. Immutable: a request sees the same adapters to its end."""

    def __init__(self, adapters: Iterable[ServedAdapter] = ()):
        self._adapters = {adapter.name: adapter for adapter in adapters}

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter(tuple(self._adapters.values()))

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def with_adapter(self, adapter: ServedAdapter) -> Registry:
        """A copy in which the adapter's name means `adapter`. A name that is already there keeps its place."""
        return Registry((self._adapters | {adapter.name: adapter}).values())

    def without(self, name: str) -> Registry:
        """A copy without one name."""
        return Registry(adapter for adapter in self if adapter.name != name)

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
