"""Errors of the service, drawn as a tree. `loraf_serve.service.status` maps each to a gRPC status.

    LorafError (loraf.errors)
    ├── InvalidRequest       fields out of range or contradictory; each Problem's field is a path in the request
    ├── DigestMismatch       the request requires another version of the adapter
    ├── LoadingOff           the server was started without --adapter-root
    ├── NameTaken            an adapter of that name is loaded, and the request does not set `replace`
    └── AdapterMemoryFull    adapters would take more memory than --adapter-memory
    Refused                  the request itself is valid
    ├── NotServing           loading, draining, or the engine is gone
    ├── QueueFull            as many requests are in flight as the server admits
    └── DeadlineExceeded     the server's default deadline has passed

See also loraf.errors (UnknownTask, CheckpointError, …), and the errors of backends in loraf_serve.backends.backend.
"""

from __future__ import annotations

from loraf.errors import LorafError


class InvalidRequest(LorafError):
    """The request is invalid; holds every violation."""


class DigestMismatch(LorafError):
    """The adapter's digest is not the one in the request."""


class LoadingOff(LorafError):
    """Clients may not load or unload adapters."""


class NameTaken(LorafError):
    """An adapter of that name is loaded."""


class AdapterMemoryFull(LorafError):
    """The adapter does not fit in the memory limit."""


class Refused(Exception):
    """The server cannot answer now; the text gives the reason."""


class NotServing(Refused):
    """The server is loading or draining, or its engine is gone."""


class QueueFull(Refused):
    """Too many requests are in flight.

    Attributes:
        retry_after: estimated seconds until a place is free.
    """

    def __init__(self, limit: int, retry_after: float):
        self.retry_after = retry_after
        super().__init__(f"{limit} requests are in flight, which is the limit; try again in {retry_after:.1f} s")


class DeadlineExceeded(Refused):
    """The request set no deadline, and the server's default deadline has passed."""

    def __init__(self, seconds: float):
        super().__init__(f"no answer within the server's default deadline of {seconds:g} s")
