"""Errors of the client, drawn as a tree. Each class below ServiceError is named like its gRPC status.

    ServiceError
    ├── InvalidArgument      `violations` names each wrong field
    ├── NotFound             no such adapter, task or named set
    ├── AlreadyExists        the adapter's name is taken
    ├── FailedPrecondition   another digest or base model; loading is switched off
    ├── Unauthenticated      no token, or a wrong one
    ├── PermissionDenied     the token does not allow this
    ├── ResourceExhausted    the queue is full, with `retry_after`; or no memory for an adapter
    ├── DeadlineExceeded     the time limit has passed
    ├── Cancelled            the call was cancelled
    ├── Unavailable          loading, draining, the engine is gone, or nothing can be reached
    ├── Unimplemented        the server is older than the client
    ├── DataLoss             a checkpoint is damaged
    └── Internal             a fault of the server; its log has more under `request_id`

Any other status is a plain ServiceError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

REQUEST_ID_METADATA = "loraf-request-id"


class ServiceError(Exception):
    """The server refused the request, failed, or cannot be reached.

    Attributes:
        code: name of the gRPC status, such as "NOT_FOUND".
        message: the server's text.
        violations: with INVALID_ARGUMENT, (field, description) of each mistake.
        retry_after: with RESOURCE_EXHAUSTED from a full queue, seconds after which to try again; else None.
        request_id: the server's id of the request, which is in its log; "" if no server answered.
    """

    def __init__(
        self,
        code: str,
        message: str,
        violations: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ):
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.request_id = request_id
        super().__init__(f"{code}:\n{message}" if "\n" in message else f"{code}: {message}")

    def __reduce__(self) -> tuple[type[ServiceError], tuple[Any, ...]]:
        return (type(self), (self.code, self.message, self.violations, self.retry_after, self.request_id))


class InvalidArgument(ServiceError):
    """Fields of the request are out of range, contradictory or not supported. `violations` lists all of them."""


class NotFound(ServiceError):
    """There is no such adapter, task or named set."""


class AlreadyExists(ServiceError):
    """An adapter of that name is loaded, and `replace` is not set."""


class FailedPrecondition(ServiceError):
    """The adapter has another digest or base model, or the server does not let clients load."""


class Unauthenticated(ServiceError):
    """The request has no token, or a wrong one."""


class PermissionDenied(ServiceError):
    """The token does not allow this."""


class ResourceExhausted(ServiceError):
    """The queue is full, with `retry_after`; or an adapter does not fit in memory."""


class DeadlineExceeded(ServiceError):
    """The time limit has passed."""


class Cancelled(ServiceError):
    """The call was cancelled."""


class Unavailable(ServiceError):
    """The server is loading or draining, its engine is gone, or no server can be reached."""


class Unimplemented(ServiceError):
    """The server does not have this method."""


class DataLoss(ServiceError):
    """A checkpoint is damaged."""


class Internal(ServiceError):
    """The server has a fault. Its log says more under `request_id`."""


_KINDS: dict[str, type[ServiceError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNAVAILABLE": Unavailable,
    "UNIMPLEMENTED": Unimplemented,
    "DATA_LOSS": DataLoss,
    "INTERNAL": Internal,
}


def service_error(error: grpc.RpcError, address: str) -> ServiceError:
    """The ServiceError for gRPC's error of a call to `address`, blocking or not."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)  # every RpcError of a call is one
    code = error.code().name
    message = error.details() or ""
    violations: list[tuple[str, str]] = []
    retry_after = None
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]  # grpc-stubs: no pairs
    request_id = next((unquote(str(value)) for name, value in metadata if name == REQUEST_ID_METADATA), "")
    for detail in _details(error):
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        info = error_details_pb2.RequestInfo()
        if detail.Unpack(bad_request):
            violations = [(v.field, v.description) for v in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(info):
            request_id = request_id or info.request_id
    if code == "UNAVAILABLE" and "connect" in message.lower():
        message = f"no server can be reached at {address} ({message})"
    return _KINDS.get(code, ServiceError)(code, message, violations, retry_after, request_id)


def _details(error: grpc.Call | grpc.aio.AioRpcError) -> Sequence[Any]:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # also takes AioRpcError
    except (ValueError, DecodeError):  # a proxy changed the status but not its details, or sent others
        return ()
    return status.details if status else ()
