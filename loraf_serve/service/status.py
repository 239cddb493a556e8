"""Converts an exception to the gRPC status that the client sees, with details in the standard google.rpc messages.

    INVALID_ARGUMENT     BadRequest, with one field violation per mistake
    RESOURCE_EXHAUSTED   RetryInfo, when to try again, if a limit is reached
    INTERNAL             only the request id; the traceback is in the server's log
    all                  RequestInfo with the request id

No text holds a path of the server: files are named relative to their checkpoint.

Texts are shortened to fit: with more than about 8 kB of trailing metadata a client sees RESOURCE_EXHAUSTED instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
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
    PermissionDenied,
    ReadsTooSlowly,
    TryLater,
    Unauthenticated,
)

# The first class that matches decides.
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
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (LorafError, grpc.StatusCode.INVALID_ARGUMENT),  # InvalidRequest, or a refusal by the backend
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (TryLater, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ReadsTooSlowly, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotServing, grpc.StatusCode.UNAVAILABLE),
    (BackendUnavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)
ENGINE_GONE = "the engine cannot answer any more"

# The message is sent twice: percent-encoded (at worst 3 bytes for 1), and with the violations in base64 (4 for 3).
# (3 + 4/3) · 1000 + 4/3 · 1800 = 6.7 kB.
_MESSAGE_BYTES = 1000
_VIOLATIONS_BYTES = 1800
_VIOLATION_BYTES = 400  # one description
_PART_BYTES = 200  # a problem's message or field
# At least two names, so that "1/2" and "/" stay; not within a word or an address such as https://host/path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w/:.-])/[\w.+@~-]+(?:/[\w.+@~-]+)+")
_CHECKPOINT_FOLDERS = ("tasks", "statistics")
_VIOLATION_FRAME = 12  # bytes of protobuf's tags and lengths around one violation


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code for `error`; INTERNAL for an unexpected one."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


class Explanation(NamedTuple):
    """What a client is told of an error.

    Attributes:
        problems: what is wrong with the request, for a mistake of the client.
    """

    code: grpc.StatusCode
    message: str
    problems: tuple[Problem, ...] = ()


def explanation_of(error: BaseException, request_id: str) -> Explanation:
    """What a client is told of `error`: nothing of the server's folders, and of an unexpected error only that there was
    one."""
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        return Explanation(code, f"request {request_id}")
    if isinstance(error, BackendUnavailable):
        return Explanation(code, ENGINE_GONE)  # its own text may reveal internals of the server
    if isinstance(error, LorafError):
        problems = tuple(_presentable(problem) for problem in error.problems)
        return Explanation(code, str(LorafError(problems)), problems)
    message = _without_paths(str(error))
    if isinstance(error, UnsupportedField):
        return Explanation(code, message, (Problem(message, f"sampling.{error.field}"),))
    return Explanation(code, message)


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """The status for `error`, with its details."""
    code, message, problems = explanation_of(error, request_id)
    details: list[any_pb2.Any] = []
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        details.append(_packed(_bad_request(problems)))
    if isinstance(error, TryLater):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    details.append(_packed(error_details_pb2.RequestInfo(request_id=request_id)))
    return status_pb2.Status(code=code.value[0], message=cut(message, _MESSAGE_BYTES), details=details)


def cut(text: str, limit: int) -> str:
    """Shortens `text` to at most `limit` bytes of UTF-8; a shortened text ends with "…"."""
    data = text.encode()
    if len(data) <= limit:
        return text
    return data[: limit - len("…".encode())].decode(errors="ignore") + "…"


def _bad_request(problems: Iterable[Problem]) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    problems = list(problems)
    left = _VIOLATIONS_BYTES - _PART_BYTES  # reserved for a last violation that counts the omitted ones
    for i, problem in enumerate(problems):
        description = f"{problem.message} → {problem.remedy}" if problem.remedy else problem.message
        description = cut(description, _VIOLATION_BYTES)
        left -= len(problem.field.encode()) + len(description.encode()) + _VIOLATION_FRAME
        if left < 0:
            bad_request.field_violations.add(description=f"and {len(problems) - i} more")
            break
        bad_request.field_violations.add(field=problem.field, description=description)
    return bad_request


def _presentable(problem: Problem) -> Problem:
    """Removes the server's folders, and shortens texts that the client made long, so that the remedy is visible."""
    message, field = cut(_without_paths(problem.message), _PART_BYTES), cut(problem.field, _PART_BYTES)
    return Problem(message, field, _in_checkpoint(problem.file), _without_paths(problem.remedy))


def _in_checkpoint(file: str) -> str:
    """`…/ckpt/tasks/math.safetensors` → `tasks/math.safetensors`; other files by their name."""
    parts = PurePath(file).parts
    return "/".join(parts[-2:] if len(parts) > 1 and parts[-2] in _CHECKPOINT_FOLDERS else parts[-1:])


def _without_paths(text: str) -> str:
    """Replaces each absolute path by its last part: texts of libraries name files of the server."""
    return _ABSOLUTE_PATH.sub(lambda match: f"…/{PurePath(match[0]).name}", text)


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
