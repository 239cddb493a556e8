"""The token file: `TOKEN [name=NAME] [adapter=A,B] [tasks=x,y] [load] [priority] [in-flight=N] [tokens-per-minute=N]`.

One token per line; empty lines and lines that begin with # are skipped. A line with nothing after the token allows
every adapter and task, but neither loading nor priorities. Messages never contain a token, only its line.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraf.errors import ConfigError, Problem, one_line
from loraf.tasksets import name_problem
from loraf_serve.errors import Unauthenticated
from loraf_serve.security.changes import Changes
from loraf_serve.security.permissions import Permissions

log = logging.getLogger(__name__)

OPTION = "--token-file"
SHORTEST = 16  # characters of a token
LONGEST = 512
MAX_FILE_BYTES = 1 << 20
_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~+/=")  # of RFC 6750's bearer tokens
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REMEDY = "write TOKEN [name=NAME] [adapter=A,B] [tasks=x,y] [load] [priority] [in-flight=N] [tokens-per-minute=N]"


@dataclass(frozen=True)
class _Entry:
    digest: bytes  # SHA-256 of the token
    permissions: Permissions


class Tokens:
    """The tokens that the server accepts. The file is read again when it has changed.

    Args:
        file: the token file.

    Raises:
        ConfigError: the file cannot be read, or lines that cannot be used; all of them.
    """

    def __init__(self, file: Path):
        self._file = file
        self._changes = Changes([file])
        self._entries = _read(file)

    def permissions_of(self, authorization: str | None) -> Permissions:
        """Returns what a client may do.

        Args:
            authorization: the value of the client's `authorization` header or metadata; None if there is none.

        Raises:
            Unauthenticated: there is no token, or it is not one of the file's.
        """
        if self._changes.seen():
            self._reload()
        match = _BEARER.fullmatch(authorization or "")
        if match is None:
            raise Unauthenticated("no token was sent; send authorization: Bearer TOKEN, with gRPC as metadata")
        digest = _digest(match[1])
        permissions = None
        for entry in self._entries:  # all of them, so that the time does not tell which one is close
            if hmac.compare_digest(entry.digest, digest):
                permissions = entry.permissions
        if permissions is None:
            raise Unauthenticated("the token is not one of this server's")
        return permissions

    def _reload(self) -> None:
        """Reads the file again. If it cannot be used, the tokens stay as they are, and the log says why."""
        try:
            self._entries = _read(self._file)
        except ConfigError as error:
            log.error("%s has changed and cannot be used; the tokens stay as they were: %s", OPTION, error)
        else:
            log.info("%s was read again: %d tokens", OPTION, len(self._entries))


def readable_by_others(file: Path) -> bool:
    """Whether users other than the owner and the group may read the file."""
    try:
        return bool(os.stat(file).st_mode & stat.S_IROTH)
    except OSError:
        return False


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> tuple[_Entry, ...]:
    """Raises ConfigError."""
    try:
        info = os.stat(file)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe might never end
            raise ConfigError(Problem("is not a regular file", OPTION, str(file), "give a text file"))
        if info.st_size > MAX_FILE_BYTES:
            raise ConfigError(
                Problem(f"is larger than {MAX_FILE_BYTES:,} bytes", OPTION, str(file), "use fewer tokens")
            )
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(Problem(f"cannot be read ({reason})", OPTION, str(file), "give a text file")) from None
    entries: list[_Entry] = []
    problems: list[Problem] = []
    clients: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            entry = _Entry(_token(words[0]), _permissions(words[1:], number))
            if any(other.digest == entry.digest for other in entries):
                raise ValueError("the token stands on an earlier line too")
            if entry.permissions.client in clients:
                raise ValueError(f"the name {entry.permissions.client} is taken by an earlier line")
        except ValueError as error:
            problems.append(Problem(one_line(error), f"line {number}", str(file), _REMEDY))
            continue
        clients.add(entry.permissions.client)
        entries.append(entry)
    if not entries and not problems:
        problems.append(Problem("has no token", OPTION, str(file), _REMEDY))
    if problems:
        raise ConfigError(problems)
    return tuple(entries)


def _token(word: str) -> bytes:
    """The token's digest. Raises ValueError, without the token."""
    if not _CHARACTERS.issuperset(word):
        raise ValueError("the token has a character other than letters, digits and - . _ ~ + / =")
    if not SHORTEST <= len(word) <= LONGEST:
        raise ValueError(f"the token has {len(word)} characters; use {SHORTEST} to {LONGEST}")
    return _digest(word)


def _permissions(words: list[str], number: int) -> Permissions:
    """Raises ValueError."""
    values: dict[str, Any] = {"client": f"token-{number}", "load": False, "priority": False}
    given: set[str] = set()
    for word in words:
        key, equals, value = word.partition("=")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given.add(key)
        if key in ("load", "priority") and not equals:
            values[key] = True
        elif key in _VALUES and equals:
            field, convert = _VALUES[key]
            values[field] = convert(key, value)
        else:
            raise ValueError(f"{key if len(key) <= 32 else 'a word'!r} is not a permission")
    return Permissions(**values)


def _names(key: str, value: str) -> frozenset[str]:
    names = value.split(",")
    for name in names:
        if problem := name_problem(name, key):
            raise ValueError(f"{key}: {problem.message}")
    return frozenset(names)


def _client(key: str, value: str) -> str:
    if not _CLIENT.fullmatch(value):
        raise ValueError(f"{key}: use 1 to 64 letters, digits and - . _")
    return value


def _count(key: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) < 1 << 31):
        raise ValueError(f"{key}: use a whole number, at least 1")
    return int(value)


_VALUES: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "name": ("client", _client),
    "adapter": ("adapters", _names),
    "tasks": ("tasks", _names),
    "in-flight": ("in_flight", _count),
    "tokens-per-minute": ("tokens_per_minute", _count),
}
