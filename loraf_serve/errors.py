"""Errors of the service, drawn as a tree. `loraf_serve.service.status` maps each to a gRPC status.

    LorafError (loraf.errors)
    ├── InvalidRequest       fields out of range or contradictory; each Problem's field is a path in the request
    ├── DigestMismatch       the request requires another version of the adapter
    ├── LoadingOff           the server was started without --adapter-root
    ├── NameTaken            an adapter of that name is loaded, and the request does not set `replace`
    ├── AdapterMemoryFull    adapters would take more memory than --adapter-memory
    └── PermissionDenied     the client's token does not allow this
    Refused                  the request itself is valid
    ├── Unauthenticated      no token, or not one of the server's
    ├── NotServing           loading, draining, or the engine is gone
    ├── TryLater             a limit is reached; says after which time to try again
    │   ├── QueueFull        as many requests are in flight as the server admits
    │   └── RateLimited      a limit of the client's token
    ├── ReadsTooSlowly       the client does not read its answer
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


class PermissionDenied(LorafError):
    """The client's token does not allow this."""


class Refused(Exception):
    """The server cannot answer now; the text gives the reason."""


class Unauthenticated(Refused):
    """The client sent no token, or one that the server does not know."""


class NotServing(Refused):
    """The server is loading or draining, or its engine is gone."""


class TryLater(Refused):
    """A limit is reached.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, reason: str, retry_after: float):
        self.retry_after = retry_after
        super().__init__(f"{reason}; try again in {retry_after:.1f} s")


class QueueFull(TryLater):
    """Too many requests are in flight."""

    def __init__(self, limit: int, retry_after: float):
        super().__init__(f"{limit} requests are in flight, which is the limit", retry_after)


class RateLimited(TryLater):
    """The client's token has reached one of its limits."""


class ReadsTooSlowly(Refused):
    """The client does not read its answer."""


class DeadlineExceeded(Refused):
    """The request set no deadline, and the server's default deadline has passed."""

    def __init__(self, seconds: float):
        super().__init__(f"no answer within the server's default deadline of {seconds:g} s")
