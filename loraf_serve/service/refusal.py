"""The status that ends a call."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import grpc
from grpc import aio
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY  # type: ignore[attr-defined]  # not in grpc-stubs

from loraf_serve.errors import TryLater
from loraf_serve.service import status

log = logging.getLogger(__name__)
Context = aio.ServicerContext[Any, Any]
_REQUEST_ID_KEY = "loraf-request-id"
_ASCII = "".join(map(chr, range(ord(" "), ord("~") + 1))).replace("%", "")
_PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRPC's clients wait so long before they try again


class Refusal(NamedTuple):
    """The status that ends a call, as arguments of `context.abort`.

    grpc keeps the exception of the latest call until the next call, and with it the frames it passed through and the
    exception that was being handled. So `abort` is called where neither can reach an adapter: otherwise a refused
    request would keep an unloaded adapter in memory.
    """

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes | str], ...]


def refusal_of(error: BaseException, request_id: str) -> Refusal:
    """The status for `error`. Logs the traceback of an unexpected one."""
    details = status.status_of(error, request_id)
    code = status.code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log.error("request %s failed", request_id, exc_info=error)
    else:
        log.info("refused %r: %s: %s", request_id, code.name, details.message)
    metadata: list[tuple[str, bytes | str]] = [
        (GRPC_DETAILS_METADATA_KEY, details.SerializeToString()),
        request_id_metadata(request_id),
    ]
    if isinstance(error, TryLater):
        metadata.append((_PUSHBACK_KEY, str(max(1, round(error.retry_after * 1000)))))
    return Refusal(code, details.message, tuple(metadata))


def request_id_metadata(request_id: str) -> tuple[str, str]:
    """The trailing metadata with a request's id, percent-encoded: gRPC's metadata holds nothing but ASCII."""
    return _REQUEST_ID_KEY, quote(request_id, safe=_ASCII)


async def abort(context: Context, refusal: Refusal) -> NoReturn:
    """Ends the call."""
    await context.abort(*refusal)
    raise AssertionError("context.abort has returned")
