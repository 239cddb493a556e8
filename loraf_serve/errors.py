"""Why the service refuses a request, drawn as a tree. `loraf_serve.service.status` says which gRPC status each becomes.

    LorafError (loraf.errors)
    ├── InvalidRequest       fields out of range or contradictory; each Problem's field is a path in the request
    ├── DigestMismatch       the request insists on another version of the adapter
    ├── LoadingOff           the server was started without --adapter-root
    ├── NameTaken            an adapter of that name is loaded, and the request does not say `replace`
    └── AdapterMemoryFull    adapters would take more memory than --adapter-memory
    Refused                  nothing is wrong with the request
    ├── NotServing           loading, draining, or the engine is gone
    ├── QueueFull            as many requests are in flight as the server takes
    └── DeadlineExceeded     the server's default deadline went by

Beside these: loraf.errors (UnknownTask, CheckpointError, …) and what backends raise (loraf_serve.backends.backend).
"""

from __future__ import annotations

from loraf.errors import LorafError


class InvalidRequest(LorafError):
    """The request cannot be answered as it is; every violation at once."""


class DigestMismatch(LorafError):
    """The adapter's digest is not the one that the request asks for."""


class LoadingOff(LorafError):
    """Clients may not change what is loaded."""


class NameTaken(LorafError):
    """The name means another adapter already."""


class AdapterMemoryFull(LorafError):
    """There is no room for another adapter."""


class Refused(Exception):
    """The server does not answer now; the text says why."""


class NotServing(Refused):
    """The server is loading or draining, or its engine is gone."""


class QueueFull(Refused):
    """Too many requests are in flight.

    Attributes:
        retry_after: seconds after which a place should be free.
    """

    def __init__(self, limit: int, retry_after: float):
        self.retry_after = retry_after
        super().__init__(f"{limit} requests are in flight, the server takes no more; try again in {retry_after:.1f} s")


class DeadlineExceeded(Refused):
    """The request brought no deadline and the server's default went by."""

    def __init__(self, seconds: float):
        super().__init__(f"no answer within the server's default deadline of {seconds:g} s")
