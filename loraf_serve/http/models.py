"""The models that a client may name, and what the page asks about the server.

A list cannot name every set: it has the base, each adapter with all of its tasks, each task alone, and each named set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from loraf.errors import LorafError
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.errors import PermissionDenied
from loraf_serve.http.errors import renamed
from loraf_serve.http.exchange import Exchange
from loraf_serve.http.fields import field_of
from loraf_serve.request import names, selection
from loraf_serve.security.permissions import Permissions
from loraf_serve.service import access
from loraf_serve.service.doors import Inside
from loraf_serve.service.info import server_info
from loraf_serve.service.services import listed
from loraf_serve.v1 import generation_pb2 as pb


class Models:
    """Handlers of routes that only read."""

    def __init__(self, inside: Inside):
        self._inside = inside

    async def list(self, exchange: Exchange, permissions: Permissions, _: str) -> None:
        """Answers /v1/models."""
        self._require_serving()
        registry = access.visible(self._inside.library.registry, permissions)
        cards = [self._card(name, parent) for name, parent in self._names(registry, permissions)]
        await exchange.send_json({"object": "list", "data": cards})

    async def one(self, exchange: Exchange, permissions: Permissions, name: str) -> None:
        """Answers /v1/models/NAME, for any set."""
        self._require_serving()
        registry = access.visible(self._inside.library.registry, permissions)
        try:
            adapter, task_set = self._resolve(name, registry, permissions)
        except LorafError as error:
            fields = dict.fromkeys(("adapter", "task_selection"), names.FIELD)
            every = self._inside.library.registry
            raise for_client(error, every, permissions, lambda field: field_of(field, fields)) from None
        card = self._card(name, None if adapter is None or task_set.is_base else adapter.name)
        await exchange.send_json(card | {"root": names.name_of(adapter, task_set)})

    async def health(self, exchange: Exchange, _: Permissions, __: str) -> None:
        """Answers /health: 200 while requests are admitted, else 503."""
        self._require_serving()
        await exchange.send_json({"status": "SERVING"})

    async def server(self, exchange: Exchange, _: Permissions, __: str) -> None:
        """Answers /loraf/v1/server: GetServerInfo."""
        self._require_serving()
        await exchange.send_json(_json(server_info(self._inside.backend, self._inside.options)))

    async def adapters(self, exchange: Exchange, permissions: Permissions, _: str) -> None:
        """Answers /loraf/v1/adapters: ListAdapters."""
        await exchange.send_json(_json(listed(self._inside.library, permissions)))

    async def report(self, exchange: Exchange, permissions: Permissions, name: str) -> None:
        """Answers /loraf/v1/adapters/NAME/report."""
        permissions.require_adapter(name, "name")
        adapter = self._inside.library.registry.get(name)
        from loraf_serve.http.report import report_of

        await exchange.send_json(await asyncio.to_thread(report_of, adapter, permissions.tasks))

    def _require_serving(self) -> None:
        if self._inside.admission.refusal:
            raise self._inside.admission.refusal

    def _names(self, registry: Registry, permissions: Permissions) -> Iterator[tuple[str, str | None]]:
        """Names of models, and of the adapters that they are sets of."""
        yield names.BASE, None
        for name, adapter in names.listed(registry, permissions.tasks):
            yield name, adapter.name

    def _resolve(self, name: str, registry: Registry, permissions: Permissions) -> tuple[ServedAdapter | None, TaskSet]:
        """What a name stands for. Raises LorafError, with fields of a gRPC request."""
        request = pb.GenerateRequest()
        names.read(name).select(request, registry, permissions)
        access.require_asked(request, permissions)
        errors: list[LorafError] = []
        adapter, task_set, _ = selection.read(request, registry, errors)
        if errors:
            raise errors[0]
        access.require_selected(task_set, permissions)
        return adapter, task_set

    def _card(self, name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "loraf",
            "root": name,
            "parent": parent,
            "max_model_len": self._inside.backend.max_model_len,
        }


def for_client(
    error: LorafError, registry: Registry, permissions: Permissions, field_of: Callable[[str], str]
) -> LorafError:
    """What the client may know of an error. Where its token does not allow a model, the remedy names some that it does.

    Args:
        registry: every adapter.
        field_of: a field of a gRPC request → the field of this request that it was read from.
    """
    shown = renamed(access.without_other_tasks(error, permissions), field_of)
    if not isinstance(shown, PermissionDenied):
        return shown
    remedy = f"it may use: {names.choices(access.visible(registry, permissions), permissions.tasks)}"
    return PermissionDenied(
        replace(problem, remedy=remedy) if problem.field == names.FIELD else problem for problem in shown.problems
    )


def _json(message: Message) -> dict[str, Any]:
    """A message in protobuf's own JSON."""
    value: dict[str, Any] = MessageToDict(message)
    return value
