"""A server that answers as a test tells it to, and one way to call both clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraf_serve.client import AsyncClient, Client
from loraf_serve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    info_pb2,
    info_pb2_grpc,
)

CLIENTS = (Client, AsyncClient)
INFO = info_pb2.GetServerInfoResponse(
    model="tiny",
    backend="resident",
    versions={"loraf": "1.0", "torch": "2.8"},
    unsupported_fields=["sampling.structured_output"],
    limits=[info_pb2.Limit(name="max_model_len", value=256, description="tokens of <prompt> and answer")],
)


@dataclass(frozen=True)
class Refusal:
    """A status that the server ends a call with.

    Attributes:
        after: pieces that a stream sends before.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    message: str = "not now"
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    after: int = 0


@dataclass(frozen=True)
class Attempt:
    method: str
    time: float
    request: Any
    metadata: dict[str, str]


class StandIn(
    generation_pb2_grpc.GenerationServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
    info_pb2_grpc.InfoServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """Refuses calls by `refusals`, one each, and answers all later ones. Records every attempt."""

    def __init__(self, *refusals: Refusal):
        self.refusals = list(refusals)
        self.attempts: list[Attempt] = []

    def Generate(self, request, context):
        self._begin("Generate", request, context)
        return generation_pb2.GenerateResponse(choices=[generation_pb2.Choice(text="answer")])

    def StreamGenerate(self, request, context):
        refusal = self._record("StreamGenerate", request, context)
        for i in range(refusal.after if refusal else 3):
            yield generation_pb2.StreamGenerateResponse(choices=[generation_pb2.Choice(text=str(i))])
        if refusal:
            _refuse(refusal, context)

    def ListAdapters(self, request, context):
        self._begin("ListAdapters", request, context)
        return adapter_pb2.ListAdaptersResponse(adapters=[adapter_pb2.Adapter(name="trio")])

    def LoadAdapter(self, request, context):
        self._begin("LoadAdapter", request, context)
        return adapter_pb2.LoadAdapterResponse()

    def UnloadAdapter(self, request, context):
        self._begin("UnloadAdapter", request, context)
        return adapter_pb2.UnloadAdapterResponse()

    def GetServerInfo(self, request, context):
        self._begin("GetServerInfo", request, context)
        return INFO

    def Check(self, request, context):
        self._begin("Check", request, context)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def _begin(self, method, request, context) -> None:
        refusal = self._record(method, request, context)
        if refusal:
            _refuse(refusal, context)

    def _record(self, method, request, context) -> Refusal | None:
        metadata = dict(context.invocation_metadata())
        self.attempts.append(Attempt(method, time.monotonic(), request, metadata))
        return self.refusals.pop(0) if self.refusals else None


def _refuse(refusal: Refusal, context) -> None:
    context.set_trailing_metadata(refusal.metadata)
    context.abort(refusal.code, refusal.message)


@contextmanager
def standing_in(
    *refusals: Refusal, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[tuple[StandIn, str]]:
    """A StandIn that listens, and its address."""
    stand_in = StandIn(*refusals)
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(stand_in, server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(stand_in, server)
        info_pb2_grpc.add_InfoServiceServicer_to_server(stand_in, server)
        health_pb2_grpc.add_HealthServicer_to_server(stand_in, server)
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield stand_in, address.replace(":0", f":{port}")
        finally:
            server.stop(None).wait()


def call(kind: type, address: str, method: str, *arguments: Any, options: dict[str, Any] | None = None, **named: Any):
    """Calls a method of a new client of either kind; of a stream, returns all pieces."""
    if kind is Client:
        with Client(address, **(options or {})) as client:
            result = getattr(client, method)(*arguments, **named)
            return list(result) if method == "stream" else result

    async def run():
        async with AsyncClient(address, **(options or {})) as client:
            result = getattr(client, method)(*arguments, **named)
            return [piece async for piece in result] if method == "stream" else await result

    return asyncio.run(run())
