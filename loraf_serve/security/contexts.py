"""Python's TLS with the server's files, replaced without a restart."""

from __future__ import annotations

import logging
import ssl
from typing import Any

from loraf_serve.security.changes import Changes
from loraf_serve.security.tls_files import TlsFiles

log = logging.getLogger(__name__)


class CurrentContext:
    """The files as they are on the disk. While those there cannot be used, those before them stay in use."""

    def __init__(self, files: TlsFiles):
        self._files = files
        self._changes = Changes(files.paths)
        self._context = files.context()

    def get(self) -> ssl.SSLContext:
        """The context for a new connection."""
        if self._changes.seen():
            # A certificate and the key of another may be seen while both are replaced.
            if problems := self._files.problems():
                self._changes.forget()
                log.error("the TLS files have changed and cannot be used yet: %s", problems[0])
            else:
                self._context = self._files.context()
        return self._context

    def for_good(self) -> ssl.SSLContext:
        """A context for a listening socket: each of its connections gets the current one."""

        def choose(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            try:
                connection.context = self.get()
            except Exception:  # an exception here would refuse the connection
                log.exception("the TLS files could not be read again")

        context = self._files.context()
        context.sni_callback = choose  # also called for clients that name no server
        return context
