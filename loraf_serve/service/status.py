"""From an exception to the gRPC status that the client sees, with details in the standard google.rpc messages.

    INVALID_ARGUMENT     BadRequest, a field violation for each mistake
    RESOURCE_EXHAUSTED   RetryInfo, when to try again, if the queue is full
    INTERNAL             the request id and nothing else; the traceback is in the server's log

Texts are cut to fit: beyond about 8 kB of trailing metadata a client sees RESOURCE_EXHAUSTED in place of the status.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from loraf.errors import CheckpointError, CorruptCheckpoint, LorafError, Problem, UnknownTask
from loraf_serve.backends.backend import BackendUnavailable, SelfCheckFailed, UnsupportedField
from loraf_serve.errors import (
    AdapterMemoryFull,
    DeadlineExceeded,
    DigestMismatch,
    LoadingOff,
    NameTaken,
    NotServing,
    QueueFull,
)

# The first class that fits decides.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (UnknownTask, grpc.StatusCode.NOT_FOUND),
    (UnsupportedField, grpc.StatusCode.INVALID_ARGUMENT),
    (CorruptCheckpoint, grpc.StatusCode.DATA_LOSS),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION),
    (DigestMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (SelfCheckFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (LoadingOff, grpc.StatusCode.FAILED_PRECONDITION),
    (NameTaken, grpc.StatusCode.ALREADY_EXISTS),
    (AdapterMemoryFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LorafError, grpc.StatusCode.INVALID_ARGUMENT),  # InvalidRequest, or what a backend refuses in its own words
    (QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotServing, grpc.StatusCode.UNAVAILABLE),
    (BackendUnavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)
ENGINE_GONE = "the engine cannot answer any more"

# The message is sent twice: percent-encoded (3 bytes for 1 at worst), and with the violations in base64 (4 for 3).
# (3 + 4/3) · 1000 + 4/3 · 1800 = 6.7 kB.
_MESSAGE_BYTES = 1000
_VIOLATIONS_BYTES = 1800
_VIOLATION_BYTES = 400  # of one description
_PART_BYTES = 200  # of a problem's message or field
_VIOLATION_FRAME = 12  # protobuf's tags and lengths around one violation


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code for `error`; INTERNAL for what nobody expected."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """The whole status for `error`, details included."""
    code = code_of(error)
    details: list[any_pb2.Any] = []
    if code is grpc.StatusCode.INTERNAL:
        message = f"request {request_id}"
    elif isinstance(error, BackendUnavailable):
        message = ENGINE_GONE  # its own text may tell the inside of the server
    elif isinstance(error, LorafError):
        problems = [_presentable(problem) for problem in error.problems]
        message = str(LorafError(problems))
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            details.append(_packed(_bad_request(problems)))
    else:
        message = str(error)
    if isinstance(error, UnsupportedField):
        details.append(_packed(_bad_request([Problem(message, f"sampling.{error.field}")])))
    if isinstance(error, QueueFull):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code.value[0], message=cut(message, _MESSAGE_BYTES), details=details)


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8, with … where something is missing."""
    data = text.encode()
    if len(data) <= limit:
        return text
    return data[: limit - len("…".encode())].decode(errors="ignore") + "…"


def _bad_request(problems: Iterable[Problem]) -> error_details_pb2.BadRequest:
    found = error_details_pb2.BadRequest()
    problems = list(problems)
    left = _VIOLATIONS_BYTES - _PART_BYTES  # the last violation may have to say how many more there are
    for i, problem in enumerate(problems):
        description = f"{problem.message} → {problem.remedy}" if problem.remedy else problem.message
        description = cut(description, _VIOLATION_BYTES)
        left -= len(problem.field.encode()) + len(description.encode()) + _VIOLATION_FRAME
        if left < 0:
            found.field_violations.add(description=f"and {len(problems) - i} more")
            break
        found.field_violations.add(field=problem.field, description=description)
    return found


def _presentable(problem: Problem) -> Problem:
    """Names a file, but not where the server keeps it; cuts what the client made long, so that the remedy is seen."""
    message, field = cut(problem.message, _PART_BYTES), cut(problem.field, _PART_BYTES)
    return Problem(message, field, PurePath(problem.file).name, problem.remedy)


def _packed(detail) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
