"""What the holder of a token may do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loraf.errors import Problem
from loraf_serve.errors import PermissionDenied


@dataclass(frozen=True)
class Permissions:
    """What a client may do; the default is everything, as on a server without tokens.

    Attributes:
        client: name of the token in logs and metrics; "" on a server without tokens.
        adapters, tasks: names that may be used; None for all.
        load: may load, replace and unload adapters.
        priority: may set a request's priority.
        in_flight: limit on requests in flight; None for none.
        tokens_per_minute: limit on tokens of prompts and answers; None for none.
    """

    client: str = ""
    adapters: frozenset[str] | None = None
    tasks: frozenset[str] | None = None
    load: bool = True
    priority: bool = True
    in_flight: int | None = None
    tokens_per_minute: int | None = None

    def may_use(self, adapter: str) -> bool:
        """Whether the adapter of this name may be used."""
        return self.adapters is None or adapter in self.adapters

    def require_adapter(self, name: str, field: str = "adapter") -> None:
        """Raises PermissionDenied unless the adapter may be used. Does not tell whether there is one of that name."""
        if self.adapters is not None and name not in self.adapters:
            message = f"this token may not use adapter {name!r}"
            raise PermissionDenied(Problem(message, field, remedy=_one_of(self.adapters)))

    def require_tasks(self, names: Iterable[str], field: str = "task_selection") -> None:
        """Raises PermissionDenied unless all these tasks may be used."""
        if self.tasks is None:
            return
        refused = [name for name in dict.fromkeys(names) if name not in self.tasks]
        if refused:
            message = f"this token may not use {'tasks' if len(refused) > 1 else 'task'} {', '.join(refused)}"
            raise PermissionDenied(Problem(message, field, remedy=_one_of(self.tasks)))

    def require_set(self, names: Iterable[str]) -> None:
        """Raises PermissionDenied unless all tasks of a selected set may be used. Does not name the others: the client
        has not."""
        if self.tasks is not None and not self.tasks.issuperset(names):
            message = "the selected set has tasks that this token may not use"
            raise PermissionDenied(Problem(message, "task_selection", remedy=_one_of(self.tasks)))

    def require_load(self) -> None:
        """Raises PermissionDenied unless adapters may be loaded and unloaded."""
        if not self.load:
            remedy = "use a token whose line in the token file says load"
            raise PermissionDenied(Problem("this token may not load or unload adapters", remedy=remedy))

    def require_priority(self) -> None:
        """Raises PermissionDenied unless the priority may be set."""
        if not self.priority:
            remedy = "leave it out, or use a token whose line in the token file says priority"
            raise PermissionDenied(Problem("this token may not set it", "priority", remedy=remedy))


def _one_of(names: Iterable[str]) -> str:
    return f"it may use: {', '.join(sorted(names))}"
