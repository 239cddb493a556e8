"""Which pages a browser may call this server from, and under which names.

A page of another site could otherwise use a server on this machine through its visitor's browser: with a name that
leads here (`Host`), or by a call of another origin (`Origin`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from loraf_serve.addresses import is_local
from loraf_serve.http.errors import HttpRefusal

OPTION = "--http-allowed-origin"
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:[0-9]{1,5})?")
_SAFE_SITES = ("", "same-origin", "none")
_CORS = (
    ("access-control-allow-methods", "GET, POST"),
    ("access-control-allow-headers", "authorization, content-type, x-request-id"),
    ("access-control-expose-headers", "x-request-id, loraf-prompt, retry-after"),
    ("access-control-max-age", "600"),
)


class Origins:
    """What is allowed on one server.

    Args:
        host: where it listens.
        allowed: origins that may call it, such as https://app.example.org, beside its own.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()):
        self._is_local = is_local(host)
        self._host = host.lower()
        self._allowed = frozenset(allowed)

    def require(self, headers: Mapping[str, str], scheme: str) -> None:
        """Raises HttpRefusal for a foreign Host on loopback, and for a call of a page of an origin that is not allowed.

        Args:
            headers: of the request, names in lower case.
            scheme: http or https.
        """
        host = headers.get("host", "")
        if self._is_local and not self._is_here(host):
            remedy = "call it by its address, 127.0.0.1 or localhost"
            raise HttpRefusal(
                HTTPStatus.FORBIDDEN, "this server listens on this machine only", "PERMISSION_DENIED", "Host", remedy
            )
        origin = headers.get("origin", "")
        if origin in self._allowed or origin == f"{scheme}://{host}":
            return
        if (
            origin
            or headers.get("sec-fetch-site", "") not in _SAFE_SITES
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            remedy = f"start the server with {OPTION}, if pages of that origin may call it"
            raise HttpRefusal(
                HTTPStatus.FORBIDDEN,
                "pages of this origin may not call the server",
                "PERMISSION_DENIED",
                "Origin",
                remedy,
            )

    def is_foreign(self, origin: str) -> bool:
        """Whether an origin is one of those that are allowed beside the server's own."""
        return origin in self._allowed

    def answer_headers(self, origin: str) -> list[tuple[str, str]]:
        """Headers that tell a browser that pages of this origin may read the answer."""
        return [("access-control-allow-origin", origin), ("vary", "Origin"), *_CORS]

    def _is_here(self, host: str) -> bool:
        written = _HOST.fullmatch(host)
        name = (written["address"] or written["name"]).lower() if written else ""
        if name in ("localhost", self._host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
