"""vllm.Control: what the server is, Abort, and adapters. Its other methods are not registered, so UNIMPLEMENTED."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from loraf import __version__
from loraf.errors import LorafError
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.observe.call import current
from loraf_serve.request import names
from loraf_serve.service import access
from loraf_serve.service.doors import Inside
from loraf_serve.service.gate import PERMISSIONS
from loraf_serve.service.info import server_info
from loraf_serve.service.refusal import Context, Refusal, abort, refusal_of
from loraf_serve.service.services import AdapterService
from loraf_serve.service.vllm_contract.asked import LORA_NAME
from loraf_serve.service.vllm_contract.running import RunningRequests
from loraf_serve.vllm_proto import control_pb2, control_pb2_grpc

T = TypeVar("T")

API_VERSION = "vllm"
NO_LIMIT = (1 << 31) - 1  # on task sets that are served at a time
_FIELDS = {"name": LORA_NAME, "path": "source_path"}  # of LoRAF's contract → of this one


class ControlService(control_pb2_grpc.ControlServicer):
    """Describes the server, ends requests, loads and unloads adapters.

    Args:
        adapters: makes the changes.
        running: the requests that Abort can end.
    """

    def __init__(self, inside: Inside, adapters: AdapterService, running: RunningRequests):
        self._inside = inside
        self._adapters = adapters
        self._running = running
        self._instance = uuid.uuid4().hex

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.ServerInfo:
        await self._require_serving(context)
        backend, options = self._inside.backend, self._inside.options
        return control_pb2.ServerInfo(
            engine_version=server_info(backend, options).versions.get("vllm", f"loraf {__version__}"),
            api_version=API_VERSION,
            instance_id=self._instance,
            max_model_len=backend.max_model_len,
            max_loras=NO_LIMIT,
        )

    async def GetModelInfo(self, request: control_pb2.GetModelInfoRequest, context: Context) -> control_pb2.ModelInfo:
        await self._require_serving(context)
        return control_pb2.ModelInfo(
            model_id=self._inside.options.model,
            served_model_name=self._inside.options.model,
            supports_text_input=True,
            supports_token_ids_input=True,
            supports_lora=True,
        )

    async def Abort(self, request: control_pb2.AbortRequest, context: Context) -> control_pb2.AbortResponse:
        self._running.abort(request.request_ids, current().client)
        return control_pb2.AbortResponse()

    async def LoadLora(self, request: control_pb2.LoadLoraRequest, context: Context) -> control_pb2.LoadLoraResponse:
        path = self._inside.library.path_below_root(request.source_path)
        change = self._inside.library.load(request.lora_name, path)
        adapter = await self._changed(context, change, request.lora_name)
        return control_pb2.LoadLoraResponse(adapter=self._described(adapter.name, adapter))

    async def UnloadLora(
        self, request: control_pb2.UnloadLoraRequest, context: Context
    ) -> control_pb2.UnloadLoraResponse:
        change = self._inside.library.unload(request.lora_name)
        unloaded = await self._changed(context, change, request.lora_name)
        return control_pb2.UnloadLoraResponse(adapter=self._described(unloaded.adapter.name, unloaded.adapter))

    async def ListLoras(self, request: control_pb2.ListLorasRequest, context: Context) -> control_pb2.ListLorasResponse:
        permissions = PERMISSIONS.get()
        registry = access.visible(self._inside.library.registry, permissions)
        found = sorted(names.listed(registry, permissions.tasks), key=lambda pair: pair[0])
        return control_pb2.ListLorasResponse(adapters=[self._described(name, adapter) for name, adapter in found])

    async def GetKvEventSources(
        self, request: control_pb2.GetKvEventSourcesRequest, context: Context
    ) -> control_pb2.GetKvEventSourcesResponse:
        return control_pb2.GetKvEventSourcesResponse()

    async def _require_serving(self, context: Context) -> None:
        if self._inside.admission.refusal:
            await abort(context, refusal_of(self._inside.admission.refusal, current().request_id))

    async def _changed(self, context: Context, change: Coroutine[Any, Any, T], name: str) -> T:
        outcome = await self._adapters.outcome(change, name, (), _shown)
        return await abort(context, outcome) if isinstance(outcome, Refusal) else outcome

    def _described(self, name: str, adapter: ServedAdapter) -> control_pb2.LoraAdapter:
        """A name of an adapter, or of a set of its tasks. The path is not that of the server's folder."""
        _, at, tasks = name.partition("@")
        path = f"{self._inside.library.shown_path(adapter)}{at}{tasks}"
        return control_pb2.LoraAdapter(lora_id=_number(name, adapter), lora_name=name, source_path=path)


def _number(name: str, adapter: ServedAdapter) -> int:
    """A positive number of 63 bits: the same for the same name and content, without an entry that stays."""
    digest = hashlib.sha256(f"{name}@{adapter.digest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def _shown(error: BaseException) -> BaseException:
    """The error with fields of this contract."""
    if isinstance(error, LorafError):
        return type(error)(replace(p, field=_FIELDS.get(p.field, p.field)) for p in error.problems)
    return error
