"""What a door other than gRPC's gets of the service, and what the service asks of it.

The service owns the life of every door: health is SERVING only while all of them answer, one admission counts the
requests of all, and all of them drain together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.backends.backend import Backend, BackendUnavailable
from loraf_serve.observe.call import Observer
from loraf_serve.security.tokens import Tokens
from loraf_serve.service.admission import Admission
from loraf_serve.service.generations import Generations
from loraf_serve.service.server_options import ServerOptions


@dataclass(frozen=True)
class Inside:
    """The service behind the doors.

    Attributes:
        tokens: who may call; None: everybody.
        observers: are to be told of every call.
        engine_gone: to be awaited when the backend has failed for good.
    """

    backend: Backend
    library: AdapterLibrary
    admission: Admission
    generations: Generations
    options: ServerOptions
    tokens: Tokens | None
    observers: Sequence[Observer]
    engine_gone: Callable[[BackendUnavailable], Awaitable[None]]


class Door(Protocol):
    """One more way into the service. Its methods run on the service's loop."""

    async def listen(self) -> str:
        """Starts to listen; until `open`, every request is answered that the server does not serve yet.

        Returns:
            A line for people that tells the address.

        Raises:
            ConfigError: the address is in use or not available.
        """
        ...

    async def open(self) -> None:
        """Makes ready for requests. The backend has started, and admission opens next.

        Raises:
            LorafError: the door cannot serve with this backend.
        """
        ...

    async def stop(self, seconds: float) -> None:
        """Stops listening, gives answers that are ready this time to be sent, and ends every connection. Idempotent;
        also called if the door has not listened yet. No request is admitted any more."""
        ...


MakeDoor = Callable[[Inside], Door]
