"""Errors as OpenAI's clients read them: an HTTP status, and a JSON object with the field and the remedy.

    {"error": {"message", "type", "param", "code", "problems": [{"field", "message", "remedy"}], "request_id"}}

`param` is the first field. The texts are those that gRPC's clients get.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from loraf.errors import LorafError, Problem
from loraf_serve.errors import TryLater
from loraf_serve.service.status import explanation_of

log = logging.getLogger(__name__)

# gRPC's status → HTTP's, and what vLLM's app calls the error.
_STATUS = {
    "INVALID_ARGUMENT": (HTTPStatus.BAD_REQUEST, "BadRequestError"),
    "FAILED_PRECONDITION": (HTTPStatus.CONFLICT, "ConflictError"),
    "ALREADY_EXISTS": (HTTPStatus.CONFLICT, "ConflictError"),
    "NOT_FOUND": (HTTPStatus.NOT_FOUND, "NotFoundError"),
    "UNAUTHENTICATED": (HTTPStatus.UNAUTHORIZED, "AuthenticationError"),
    "PERMISSION_DENIED": (HTTPStatus.FORBIDDEN, "PermissionDeniedError"),
    "RESOURCE_EXHAUSTED": (HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError"),
    "UNAVAILABLE": (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    "DEADLINE_EXCEEDED": (HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError"),
    "UNIMPLEMENTED": (HTTPStatus.NOT_IMPLEMENTED, "NotImplementedError"),
}
_FAULT = (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
JSON = "application/json"


class HttpRefusal(Exception):
    """A request that only HTTP can send.

    Attributes:
        code: name of the gRPC status that fits best, for metrics and logs.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        code: str = "INVALID_ARGUMENT",
        field: str = "",
        remedy: str = "",
        headers: Sequence[tuple[str, str]] = (),
    ):
        self.status, self.code, self.headers = status, code, tuple(headers)
        self.problem = Problem(message, field, remedy=remedy)
        super().__init__(str(self.problem))


class OnlyVllm(LorafError):
    """Fields that only vLLM's own app obeys, and the backend is not one of vLLM's."""


@dataclass(frozen=True)
class ErrorAnswer:
    """What a client gets for an error.

    Attributes:
        code: name of the gRPC status.
        error: the JSON object below "error".
    """

    status: HTTPStatus
    code: str
    error: Mapping[str, object]
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """The JSON object of the whole answer."""
        return json.dumps({"error": self.error}).encode()


def answer_of(
    error: BaseException, request_id: str, field_of: Callable[[str], str] = lambda field: field
) -> ErrorAnswer:
    """What the client gets for `error`. Logs the traceback of an unexpected one.

    Args:
        field_of: a field of a gRPC request → the field of this request that it was read from.
    """
    headers: list[tuple[str, str]] = []
    problems: tuple[Problem, ...]
    if isinstance(error, HttpRefusal):
        code, status, kind = error.code, error.status, _kind(error.status)
        message, problems = str(error), (error.problem,)
        headers += error.headers
    elif isinstance(error, OnlyVllm):
        code, (status, kind) = "UNIMPLEMENTED", _STATUS["UNIMPLEMENTED"]
        message, problems = str(error), tuple(error.problems)
    else:
        explanation = explanation_of(error, request_id)
        code, message, problems = explanation.code.name, explanation.message, explanation.problems
        status, kind = _STATUS.get(code, _FAULT)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request %s failed", request_id, exc_info=error)
    else:
        log.info("refused %r: %s: %s", request_id, code, message)
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append(("www-authenticate", "Bearer"))
    if isinstance(error, TryLater):
        headers.append(("retry-after", str(math.ceil(error.retry_after))))
    return ErrorAnswer(status, code, _error(message, kind, status, problems, request_id), tuple(headers))


def answer_of_vllm(error: Mapping[str, object], status: int, request_id: str) -> ErrorAnswer:
    """What the client gets for an error that vLLM's app has found.

    Args:
        error: the JSON object below "error" in the app's answer.
    """
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        log.error("request %s failed in vLLM's app: %s", request_id, error.get("message"))
        code, (http_status, kind) = "INTERNAL", _FAULT
        return ErrorAnswer(http_status, code, _error(f"request {request_id}", kind, http_status, (), request_id))
    code = next((code for code, (known, _) in _STATUS.items() if known == status), "INVALID_ARGUMENT")
    field = error.get("param")
    problem = Problem(str(error.get("message", "")), field if isinstance(field, str) else "")
    http_status = HTTPStatus(status)
    log.info("vLLM's app refused %r: %s", request_id, problem)
    return ErrorAnswer(
        http_status, code, _error(problem.message, _kind(http_status), http_status, (problem,), request_id)
    )


def renamed(error: LorafError, field_of: Callable[[str], str]) -> LorafError:
    """The error with other fields.

    Args:
        field_of: a field of a gRPC request → the field of the body that it was read from.
    """
    return type(error)(Problem(p.message, field_of(p.field), p.file, p.remedy) for p in error.problems)


def _kind(status: HTTPStatus) -> str:
    return next((kind for known, kind in _STATUS.values() if known is status), "BadRequestError")


def _error(
    message: str, kind: str, status: HTTPStatus, problems: Sequence[Problem], request_id: str
) -> dict[str, object]:
    return {
        "message": message,
        "type": kind,
        "param": next((problem.field for problem in problems if problem.field), None),
        "code": status.value,
        "problems": [{"field": p.field, "message": p.message, "remedy": p.remedy} for p in problems],
        "request_id": request_id,
    }
