"""The methods of both clients: the request of each call, and what its response becomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraf_serve.client.errors import DeadlineExceeded, ServiceError
from loraf_serve.client.request_message import request_of
from loraf_serve.client.results import AdapterList, Answer, ServerInfo, answer_of, server_info_of
from loraf_serve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    info_pb2,
    info_pb2_grpc,
)

T = TypeVar("T")

SERVING = "SERVING"
_PROBE_SECONDS = 5.0  # time limit of one health check while waiting
_PAUSE_SECONDS = 0.2  # between two of them


class Stubs:
    """gRPC's stubs on a channel, blocking or not."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel):
        # Generated code for services has no types, hence the ignores.
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
        self.info = info_pb2_grpc.InfoServiceStub(channel)  # type: ignore[no-untyped-call]
        self.health = health_pb2_grpc.HealthStub(channel)


@dataclass(frozen=True)
class UnaryCall(Generic[T]):
    """A call with one response.

    Attributes:
        method: chooses the stub's method.
        read: makes the result from the response.
    """

    method: Callable[[Stubs], Callable[..., Any]]
    request: Message
    read: Callable[[Any], T]


def generate(prompt: str | None, request: Mapping[str, Any]) -> UnaryCall[Answer]:
    message = request_of(generation_pb2.GenerateRequest, prompt, **request)
    return UnaryCall(lambda stubs: stubs.generation.Generate, message, answer_of)


def list_adapters() -> UnaryCall[AdapterList]:
    message = adapter_pb2.ListAdaptersRequest()
    return UnaryCall(
        lambda stubs: stubs.adapters.ListAdapters, message, lambda response: AdapterList(response.adapters)
    )


def load_adapter(name: str, path: str, tasks: Sequence[str] | None, replace: bool) -> UnaryCall[adapter_pb2.Adapter]:
    if isinstance(tasks, str):
        raise TypeError(f"tasks is a list of names: tasks=[{tasks!r}]")
    message = adapter_pb2.LoadAdapterRequest(name=name, path=path, tasks=tasks, replace=replace)
    return UnaryCall(lambda stubs: stubs.adapters.LoadAdapter, message, lambda response: response.adapter)


def unload_adapter(name: str) -> UnaryCall[adapter_pb2.UnloadAdapterResponse]:
    message = adapter_pb2.UnloadAdapterRequest(name=name)
    return UnaryCall(lambda stubs: stubs.adapters.UnloadAdapter, message, lambda response: response)


def server_info() -> UnaryCall[ServerInfo]:
    return UnaryCall(lambda stubs: stubs.info.GetServerInfo, info_pb2.GetServerInfoRequest(), server_info_of)


def health() -> UnaryCall[str]:
    def read(response: health_pb2.HealthCheckResponse) -> str:
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    return UnaryCall(lambda stubs: stubs.health.Check, health_pb2.HealthCheckRequest(), read)


class Waiting:
    """Waits until a server serves, by repeated health checks: one that does not listen yet refuses the connection.

    Args:
        timeout: seconds; None for no limit.
    """

    def __init__(self, timeout: float | None):
        self._timeout = float("inf") if timeout is None else timeout
        self._end = time.monotonic() + self._timeout

    def probe_seconds(self) -> float:
        """Time limit of the next health check."""
        return max(0.05, min(_PROBE_SECONDS, self._end - time.monotonic()))

    def pause_after(self, outcome: str | ServiceError) -> float:
        """Returns the seconds until the next health check.

        Args:
            outcome: of the last one.

        Raises:
            ServiceError: the time is over (DEADLINE_EXCEEDED), or waiting cannot help.
        """
        if isinstance(outcome, ServiceError) and outcome.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise outcome
        left = self._end - time.monotonic()
        if left <= 0:
            reason = outcome.message if isinstance(outcome, ServiceError) else outcome
            raise DeadlineExceeded("DEADLINE_EXCEEDED", f"not serving within {self._timeout:g} s: {reason}")
        return min(_PAUSE_SECONDS, left)
