"""Every route there is: what is not listed here does not exist."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from loraf_serve.http.errors import HttpRefusal
from loraf_serve.http.exchange import Exchange
from loraf_serve.security.permissions import Permissions

Handler = Callable[[Exchange, Permissions, str], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """One method of one path.

    Attributes:
        path: may have one part in braces, which stands for any name without a slash.
        handler: gets the exchange, what the client may do, and the name in the path.
        is_observed: needs a token where the server has some, and is told to observers.
    """

    method: str
    path: str
    handler: Handler
    is_observed: bool = True

    def fits(self, path: str) -> bool:
        """Whether a path is of this route."""
        begin, brace, rest = self.path.partition("{")
        end = rest.partition("}")[2]
        if not brace:
            return path == self.path
        name = self.name_in(path)
        return path == f"{begin}{name}{end}" and bool(name) and "/" not in name

    def name_in(self, path: str) -> str:
        """The part of a path that stands where this route has braces; "" if it has none."""
        begin, brace, rest = self.path.partition("{")
        return path[len(begin) : len(path) - len(rest.partition("}")[2])] if brace else ""


class Routes:
    """The routes of a server.

    Args:
        routes: for a path that several fit, the first counts.
    """

    def __init__(self, routes: Sequence[Route]):
        self._routes = tuple(routes)

    def find(self, method: str, path: str) -> Route:
        """Raises HttpRefusal: there is no such path, or it has another method."""
        method = "GET" if method == "HEAD" else method
        fitting = [route for route in self._routes if route.fits(path)]
        if not fitting:
            paths = ", ".join(dict.fromkeys(route.path for route in self._routes if route.path.startswith("/v1/")))
            raise HttpRefusal(
                HTTPStatus.NOT_FOUND, "there is no such path", "UNIMPLEMENTED", "path", f"choose from: {paths}"
            )
        for route in fitting:
            if route.method == method:
                return route
        allowed = ", ".join(route.method for route in fitting)
        raise HttpRefusal(
            HTTPStatus.METHOD_NOT_ALLOWED,
            "the path has another method",
            "UNIMPLEMENTED",
            "method",
            f"use {allowed}",
            headers=(("allow", allowed),),
        )
