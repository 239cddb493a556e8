"""Serves the files of `loraf_serve.page`: `/` and `/page/NAME`. They tell nothing of the server and need no token."""

from __future__ import annotations

import mimetypes
from functools import cache
from http import HTTPStatus
from importlib import resources

from loraf_serve.http.errors import HttpRefusal
from loraf_serve.http.exchange import Exchange
from loraf_serve.security.permissions import Permissions

_PACKAGE = "loraf_serve.page"
_INDEX = "index.html"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_TYPES[".html"] = "text/html; charset=utf-8"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (("content-security-policy", _POLICY), ("cache-control", "no-cache"))


async def index(exchange: Exchange, _: Permissions, __: str) -> None:
    """Answers /."""
    await _send(exchange, _INDEX)


async def file(exchange: Exchange, _: Permissions, name: str) -> None:
    """Answers /page/NAME."""
    await _send(exchange, name)


async def _send(exchange: Exchange, name: str) -> None:
    body = _files().get(name)
    if body is None:
        raise HttpRefusal(HTTPStatus.NOT_FOUND, "there is no such file", "NOT_FOUND", "path")
    suffix = name[name.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    await exchange.send(body, kind, headers=_HEADERS)


@cache
def _files() -> dict[str, bytes]:
    """The page's files by name: what is not among them is not served, whatever a path says."""
    folder = resources.files(_PACKAGE)
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.is_file() and not entry.name.endswith((".py", ".pyc"))
    }
