"""An adapter and a set of its tasks as one name: a model over HTTP, a LoRA over vLLM's gRPC.

    base                  the base model
    ckpt                  every task of the adapter ckpt
    ckpt@math:0.5+nlu     tasks with weights; also ckpt@all, ckpt@as_trained=nlu, ckpt@support (a named set)
    @math                 the same of the only adapter; no name at all: every task of it, or the base if there is none

What follows the @ is read as everywhere else; see `loraf.set_text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from loraf import set_text
from loraf.errors import Problem, SelectionError, UnknownTask
from loraf.set_text import AS_TRAINED, SetText
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import InvalidRequest
from loraf_serve.limits import MAX_SELECTED_TASKS
from loraf_serve.security.permissions import Permissions
from loraf_serve.v1 import generation_pb2 as pb

BASE = "base"
FIELD = "model"
_MOST_CHOICES = 20  # of a remedy


@dataclass(frozen=True)
class ModelName:
    """A name as it was written.

    Attributes:
        adapter: "" for the only one, and for the base model.
        written: the set; None if the name has none.
        field: of the request, for errors.
    """

    text: str
    adapter: str = ""
    written: SetText | None = None
    field: str = FIELD

    @property
    def is_base(self) -> bool:
        """Whether it is the base model, whatever adapters there are."""
        return self.text == BASE

    def select(self, request: pb.GenerateRequest, registry: Registry, permissions: Permissions) -> None:
        """Writes adapter and selection into a request.

        Args:
            registry: the adapters that the client may use.

        Raises:
            PermissionDenied: an adapter that the client may not use.
            UnknownTask: there is no such adapter.
        """
        selection = request.task_selection
        if self.is_base or (not self.text and not len(registry)):
            request.adapter = ""
            selection.base.SetInParent()
            return
        if self.adapter:
            permissions.require_adapter(self.adapter, self.field)
            if self.adapter not in registry:
                remedy = f"choose from: {choices(registry, permissions.tasks)}"
                raise UnknownTask(Problem(f"there is no model {self.text!r}", self.field, remedy=remedy))
        request.adapter = self.adapter
        if self.written is None:
            selection.all.SetInParent()
        elif self.written.kind == AS_TRAINED:
            selection.as_trained.name = self.written.name
        elif self.written.kind == "tasks" and not self._is_named_set(registry):
            for name, weight in self.written.pairs:
                selection.tasks.tasks.add(name=name, weight=weight)
        elif self.written.kind == "tasks":
            selection.named.name = self.written.name
        else:
            getattr(selection, self.written.kind).SetInParent()

    def _is_named_set(self, registry: Registry) -> bool:
        assert self.written is not None
        adapters = [adapter for adapter in registry if self.adapter in ("", adapter.name)]
        return len(adapters) == 1 and self.written.name in registry.sets_of(adapters[0])


def read(text: str, field: str = FIELD) -> ModelName:
    """Reads a name. Raises InvalidRequest: what follows the @ is not a set, or has too many tasks.

    Args:
        field: of the request, for errors.
    """
    adapter, at, tasks = text.partition("@")
    count = tasks.count("+") + tasks.count(",") + 1
    if count > MAX_SELECTED_TASKS:
        remedy = f"use at most {MAX_SELECTED_TASKS}"
        raise InvalidRequest(Problem(f"names {count} tasks", field, remedy=remedy))
    if not at:
        return ModelName(text, "" if text == BASE else text, field=field)
    try:
        return ModelName(text, adapter, set_text.parse(tasks), field)
    except SelectionError as error:
        raise InvalidRequest(Problem(p.message, field, remedy=p.remedy) for p in error.problems) from None


def listed(registry: Registry, tasks: frozenset[str] | None) -> Iterator[tuple[str, ServedAdapter]]:
    """Names that a list can show, and their adapters: each adapter, each task alone, each named set.

    Args:
        registry: the adapters that the client may use.
        tasks: those that it may use; None for all.
    """
    for adapter in registry:
        if tasks is None or tasks.issuperset(adapter.tasks):
            yield adapter.name, adapter
        alone = [task for task in adapter.tasks if tasks is None or task in tasks]
        for name in (*alone, *registry.sets_of(adapter)):
            yield f"{adapter.name}@{name}", adapter


def choices(registry: Registry, tasks: frozenset[str] | None) -> str:
    """Names that a client may send, as a remedy lists them.

    Args:
        registry, tasks: as of `listed`.
    """
    if tasks is None:
        names = [BASE, *(adapter.name for adapter in registry)]
        return f"{', '.join(names)}; tasks follow an @, as in NAME@TASK:0.5+TASK"
    names = [BASE, *(name for name, _ in islice(listed(registry, tasks), _MOST_CHOICES))]
    return f"{', '.join(names)}; weights follow a colon, as in NAME@TASK:0.5+TASK"


def name_of(adapter: ServedAdapter | None, task_set: TaskSet) -> str:
    """The canonical name of what answers a request."""
    if adapter is None or task_set.is_base:
        return BASE
    return f"{adapter.name}@{task_set}"


def fingerprint(adapter: ServedAdapter | None, task_set: TaskSet) -> str:
    """What `system_fingerprint` says: the adapter's digest and the set in canonical order."""
    if adapter is None or task_set.is_base:
        return f"loraf:{BASE}"
    return f"loraf:{adapter.digest}:{task_set}"
