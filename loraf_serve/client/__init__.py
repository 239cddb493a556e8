"""Python clients for loraf-serve: `Client`, and `AsyncClient` for asyncio.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("2 + 3 =", tasks=["math"], temperature=0))
        for piece in client.stream("2 + 3 =", tasks={"math": 1.0, "nlu": 0.5}, max_tokens=100):
            print(piece, end="", flush=True)

Without `tasks`, `named`, `as_trained` or `base`, all tasks of the adapter are used. For requests that these clients do
not cover, use the messages and stubs in `loraf_serve.v1`.

    blocking, asynchronous ──▶ calls (one per method), streams ──▶ request_message, results, errors
                           ──▶ connection (TLS, token, retries)

Knows the server only by its protocol.
"""

from loraf_serve.client.asynchronous import AsyncClient
from loraf_serve.client.blocking import Client
from loraf_serve.client.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServiceError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from loraf_serve.client.request_message import request_of
from loraf_serve.client.results import AdapterList, Answer, Piece, ServerInfo
from loraf_serve.client.streams import AsyncStream, Stream

__all__ = [
    "AdapterList",
    "AlreadyExists",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "Piece",
    "ResourceExhausted",
    "ServerInfo",
    "ServiceError",
    "Stream",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "request_of",
]
