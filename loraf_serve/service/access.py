"""Applies the permissions of a client's token to its requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from loraf.errors import LorafError, Problem
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.errors import InvalidRequest, PermissionDenied
from loraf_serve.limits import MAX_SELECTED_TASKS
from loraf_serve.security.permissions import Permissions
from loraf_serve.security.tokens import Tokens
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb


def visible(registry: Registry, permissions: Permissions) -> Registry:
    """The adapters that the client may use; the others do not exist for it."""
    return registry.limited_to(permissions.tasks, permissions.adapters)


def require_asked(request: pb.GenerateRequest | pb.StreamGenerateRequest, permissions: Permissions) -> None:
    """Checks what the request names, before it is validated: errors must not tell what else there is.

    Raises:
        PermissionDenied: an adapter or task that the client may not use, or a priority that it may not set.
    """
    if request.priority:
        permissions.require_priority()
    if request.adapter:
        permissions.require_adapter(request.adapter)
    selection = request.task_selection
    if selection.HasField("as_trained"):
        permissions.require_tasks([selection.as_trained.name], "task_selection.as_trained.name")
    tasks = selection.tasks.tasks
    if len(tasks) <= MAX_SELECTED_TASKS:  # more are refused whatever their names
        permissions.require_tasks((task.name for task in tasks), "task_selection.tasks.tasks")


def require_change(name: str, tasks: Sequence[str], permissions: Permissions) -> None:
    """Raises PermissionDenied unless the client may load, replace and unload the adapter of that name.

    Args:
        tasks: those that are to be loaded; empty for all.
    """
    permissions.require_load()
    permissions.require_adapter(name, "name")
    if len(tasks) > MAX_SELECTED_TASKS:
        message, remedy = f"has {len(tasks)} tasks", f"use at most {MAX_SELECTED_TASKS}"
        raise InvalidRequest(Problem(message, "tasks", remedy=remedy))
    permissions.require_tasks(tasks, "tasks")


def require_selected(task_set: TaskSet, permissions: Permissions) -> None:
    """Checks the task set that a valid request selects: all tasks, those of a named set, those of `as_trained`.

    Raises:
        PermissionDenied: a task that the client may not use.
    """
    permissions.require_set(task_set.names)


def metrics_reader(tokens: Tokens) -> Callable[[str | None], None]:
    """The check of a client that reads metrics. They name every adapter and task, so its token must be for all."""

    def check(authorization: str | None) -> None:
        permissions = tokens.permissions_of(authorization)
        if permissions.adapters is not None or permissions.tasks is not None:
            raise PermissionDenied("metrics need a token for every adapter and task")

    return check


def shown(adapter: adapter_pb2.Adapter, permissions: Permissions) -> adapter_pb2.Adapter:
    """The description of an adapter without tasks that the client may not use."""
    allowed = permissions.tasks
    if allowed is None:
        return adapter
    description = adapter_pb2.Adapter()
    description.CopyFrom(adapter)
    del description.tasks[:]
    for task in adapter.tasks:
        if task.name in allowed:
            description.tasks.append(task)
            description.tasks[-1].trained_with[:] = [name for name in task.trained_with if name in allowed]
    return description


def without_other_tasks(error: LorafError, permissions: Permissions) -> LorafError:
    """The error, without the names of tasks that the client may not use."""
    if permissions.tasks is None:
        return error
    remedy = f"this token may use: {', '.join(sorted(permissions.tasks))}"
    return type(error)(
        replace(problem, remedy=remedy)
        if problem.remedy.startswith("choose from") and problem.field not in _NAME_NO_TASK
        else problem
        for problem in error.problems
    )


# Fields whose problems list adapters and models: what the client may not use is not among them.
_NAME_NO_TASK = ("adapter", "name", "model", "lora_name")
