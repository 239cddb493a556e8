"""Reads which adapter and which task set a request selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraf.errors import LorafError, Problem, SelectionError, UnknownTask
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import DigestMismatch, InvalidRequest
from loraf_serve.v1 import generation_pb2 as pb

_KINDS = "all, tasks, named, as_trained or base"
Selection = tuple[ServedAdapter | None, TaskSet, str | None]


def read(
    request: pb.GenerateRequest | pb.StreamGenerateRequest, registry: Registry, errors: list[LorafError]
) -> Selection:
    """Returns the adapter, the task set in canonical order, and the task's name if exactly one is selected.

    Mistakes are appended to `errors`, with fields as paths in the request: InvalidRequest, UnknownTask (an adapter or a
    task), DigestMismatch. The returned values are meaningless then.
    """
    is_base = request.task_selection.WhichOneof("selection") == "base"
    try:
        # The base model is the same whatever adapters there are.
        is_any = is_base and not request.adapter and len(registry) > 1
        adapter = None if is_any else registry.find(request.adapter)
    except (InvalidRequest, UnknownTask) as error:
        errors.append(error)
        _check_form(request, errors)
        return None, TaskSet(), None
    if request.adapter_digest and request.adapter_digest != (adapter.digest if adapter else ""):
        missing = "no adapter is named" if len(registry) else "no adapter is loaded"
        message = f"adapter {adapter.name!r} has digest {adapter.digest}" if adapter else missing
        remedy = "use the digest that is served, or leave the field out"
        errors.append(DigestMismatch(Problem(message, "adapter_digest", remedy=remedy)))
    if adapter is None:
        if not is_base:
            message = "no adapter is loaded, so there are no tasks to select"
            errors.append(InvalidRequest(Problem(message, "task_selection", remedy="select base")))
        return None, TaskSet(), None
    try:
        return adapter, *_task_set(request, adapter, registry)
    except (SelectionError, InvalidRequest) as error:
        errors.append(error)
        return adapter, TaskSet(), None


def _check_form(request: pb.GenerateRequest | pb.StreamGenerateRequest, errors: list[LorafError]) -> None:
    """Checks a selection without knowing the adapter: every task name is accepted."""
    try:
        _read_tasks(request, order=[task.name for task in request.task_selection.tasks.tasks])
    except InvalidRequest as error:
        errors.append(error)


def _task_set(
    request: pb.GenerateRequest | pb.StreamGenerateRequest, adapter: ServedAdapter, registry: Registry
) -> tuple[TaskSet, str | None]:
    """The task set, and the task's name if exactly one is selected. Raises InvalidRequest, UnknownTask."""
    manifest = adapter.manifest
    kind = request.task_selection.WhichOneof("selection")
    if kind == "as_trained":
        name = request.task_selection.as_trained.name
        try:
            return manifest.as_trained(name), name
        except UnknownTask as error:
            raise UnknownTask(replace(p, field="task_selection.as_trained.name") for p in error.problems) from None
    if kind == "named":
        named = _named(request.task_selection.named.name, adapter, registry)
        return named, named.names[0] if len(named.names) == 1 else None
    try:
        task_set = _read_tasks(request, adapter.tasks)
    except (InvalidRequest, UnknownTask) as error:
        sets, tasks = registry.sets_of(adapter), request.task_selection.tasks.tasks
        fields = {f"task_selection.tasks.tasks[{i}].name": t.name for i, t in enumerate(tasks) if t.name in sets}
        raise type(error)(_or_named(problem, fields) for problem in error.problems) from None
    if task_set is not None:
        names = [task.name for task in request.task_selection.tasks.tasks]
        return task_set, names[0] if len(names) == 1 else None
    if kind == "base":
        return TaskSet(), None
    return manifest.all_tasks(), adapter.tasks[0] if len(adapter.tasks) == 1 else None


def _named(name: str, adapter: ServedAdapter, registry: Registry) -> TaskSet:
    """The set of that name. Raises UnknownTask, which lists the names there are."""
    sets = registry.sets_of(adapter)
    if name in sets:
        return sets[name].task_set
    message = f"adapter {adapter.name!r} has no named set {name!r}"
    remedy = f"choose from: {', '.join(sets) or 'none'}"
    if name in adapter.tasks and not registry.is_hidden(name):
        message, remedy = f"{name!r} is a task, not a named set", "select it with tasks"
    raise UnknownTask(Problem(message, "task_selection.named.name", remedy=remedy))


def _or_named(problem: Problem, named: Mapping[str, str]) -> Problem:
    """The problem with a name in `tasks`, which may be that it is the name of a named set.

    Args:
        named: path of the field → name, of those names in `tasks` that are named sets.
    """
    if problem.field not in named:
        return problem
    message = f"{named[problem.field]!r} is a named set, not a task"
    return replace(problem, message=message, remedy="select it with named")


def _read_tasks(request: pb.GenerateRequest | pb.StreamGenerateRequest, order: Sequence[str]) -> TaskSet | None:
    """The set that `tasks` names; None if the request selects in another way.

    Args:
        order: all task names, in canonical order.

    Raises:
        InvalidRequest: the selection is empty, names a task twice, or has a weight out of range.
        UnknownTask: a name is not in `order`.
    """
    kind = request.task_selection.WhichOneof("selection")
    if kind is None and request.HasField("task_selection"):
        # Not read as «all»: it may be a kind of selection that this release does not know.
        remedy = f"set {_KINDS}, or leave task_selection out for all"
        raise InvalidRequest(Problem("is empty", "task_selection.selection", remedy=remedy))
    if kind != "tasks":
        return None
    tasks = request.task_selection.tasks.tasks
    if not tasks:
        remedy = "name a task, or select base or all"
        raise InvalidRequest(Problem("names no task", "task_selection.tasks.tasks", remedy=remedy))
    pairs = [(task.name, task.weight if task.HasField("weight") else 1.0) for task in tasks]
    try:
        return TaskSet.of(pairs, order)
    except SelectionError as error:
        problems = [replace(p, field=f"task_selection.tasks.{p.field}") for p in error.problems]
        error_type = UnknownTask if isinstance(error, UnknownTask) else InvalidRequest
        raise error_type(problems) from None
