"""Which adapter and which task set a request means."""

from __future__ import annotations

from dataclasses import replace

from loraf.errors import LorafError, Problem, SelectionError, UnknownTask
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import DigestMismatch, InvalidRequest
from loraf_serve.v1 import generation_pb2 as pb

_KINDS = "all, tasks, as_trained or base"
Selection = tuple[ServedAdapter | None, TaskSet, str | None]


def read(
    request: pb.GenerateRequest | pb.StreamGenerateRequest, registry: Registry, errors: list[LorafError]
) -> Selection:
    """The adapter, the canonical task set, and the task's name if exactly one is chosen.

    What is wrong is appended to `errors`, with fields as paths in the request: InvalidRequest, UnknownTask (an adapter
    or a task), DigestMismatch. Adapter, set and name mean nothing then.
    """
    try:
        adapter = registry.find(request.adapter)
    except (InvalidRequest, UnknownTask) as error:
        errors.append(error)
        _check_form(request, errors)
        return None, TaskSet(), None
    if request.adapter_digest and request.adapter_digest != (adapter.digest if adapter else ""):
        message = f"adapter {adapter.name!r} has digest {adapter.digest}" if adapter else "no adapter is loaded"
        remedy = "ask for the digest that is served, or leave the field out"
        errors.append(DigestMismatch(Problem(message, "adapter_digest", remedy=remedy)))
    if adapter is None:
        if request.task_selection.WhichOneof("selection") != "base":
            message = "no adapter is loaded, so there are no tasks to choose"
            errors.append(InvalidRequest(Problem(message, "task_selection", remedy="choose base")))
        return None, TaskSet(), None
    try:
        return adapter, *_task_set(request, adapter)
    except (SelectionError, InvalidRequest) as error:
        errors.append(error)
        return adapter, TaskSet(), None


def _check_form(request: pb.GenerateRequest | pb.StreamGenerateRequest, errors: list[LorafError]) -> None:
    """What can be said of a selection without knowing the adapter: every task that it names may exist."""
    try:
        _read_tasks(request, order=[task.name for task in request.task_selection.tasks.tasks])
    except InvalidRequest as error:
        errors.append(error)


def _task_set(
    request: pb.GenerateRequest | pb.StreamGenerateRequest, adapter: ServedAdapter
) -> tuple[TaskSet, str | None]:
    """Raises InvalidRequest, UnknownTask."""
    manifest = adapter.manifest
    kind = request.task_selection.WhichOneof("selection")
    if kind == "as_trained":
        name = request.task_selection.as_trained.name
        try:
            return manifest.as_trained(name), name
        except UnknownTask as error:
            raise UnknownTask(replace(p, field="task_selection.as_trained.name") for p in error.problems) from None
    chosen = _read_tasks(request, adapter.tasks)
    if chosen is not None:
        names = [task.name for task in request.task_selection.tasks.tasks]
        return chosen, names[0] if len(names) == 1 else None
    if kind == "base":
        return TaskSet(), None
    return manifest.all_tasks(), adapter.tasks[0] if len(adapter.tasks) == 1 else None


def _read_tasks(request: pb.GenerateRequest | pb.StreamGenerateRequest, order) -> TaskSet | None:
    """The set that `tasks` names; None if the request chooses in another way.

    Raises:
        InvalidRequest: the selection says nothing, names no task, a name twice, a weight out of range.
        UnknownTask: a name is not in `order`.
    """
    kind = request.task_selection.WhichOneof("selection")
    if kind is None and request.HasField("task_selection"):
        # Not taken as «all»: it may be a kind of selection that this release does not know.
        remedy = f"set {_KINDS}, or leave task_selection out for all"
        raise InvalidRequest(Problem("is empty", "task_selection.selection", remedy=remedy))
    if kind != "tasks":
        return None
    chosen = request.task_selection.tasks.tasks
    if not chosen:
        remedy = "name a task, or choose base or all"
        raise InvalidRequest(Problem("names no task", "task_selection.tasks.tasks", remedy=remedy))
    pairs = [(task.name, task.weight if task.HasField("weight") else 1.0) for task in chosen]
    try:
        return TaskSet.of(pairs, order)
    except SelectionError as error:
        problems = [replace(p, field=f"task_selection.tasks.{p.field}") for p in error.problems]
        kind_of_error = UnknownTask if isinstance(error, UnknownTask) else InvalidRequest
        raise kind_of_error(problems) from None
