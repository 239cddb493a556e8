"""Serves the files of `loraf_serve.page`: `/` and `/page/NAME`. They tell nothing of the server and need no token."""

from __future__ import annotations

import mimetypes
import re
from functools import cache
from http import HTTPStatus
from importlib import resources

from loraf.errors import Problem
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
_USED = re.compile(r"page/([a-z]+\.[a-z]+)")
_IMPORTED = re.compile(r'from "\./([a-z]+\.js)"')
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


def problems() -> list[Problem]:
    """What is missing of the page in this installation."""
    files = _files()
    if _INDEX in files:
        used = {_INDEX, *_USED.findall(files[_INDEX].decode())}
        used.update(name for text in files.values() for name in _IMPORTED.findall(text.decode("utf-8", "replace")))
    else:
        used = {_INDEX}
    return [
        Problem(f"the page's file {name} is missing", "--http-port", remedy="install loraf again, with its page")
        for name in sorted(used - files.keys())
    ]


@cache
def _files() -> dict[str, bytes]:
    """The page's files by name: what is not among them is not served, whatever a path says."""
    folder = resources.files(_PACKAGE)
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.is_file() and not entry.name.endswith((".py", ".pyc"))
    }
