"""The TLS files of the server. Standard library only."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import Problem


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.

    Attributes:
        certificate, key: of the server; the key is not encrypted.
        client_authority: must have signed the clients' certificates; None if clients need none.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All files there are."""
        return [file for file in (self.certificate, self.key, self.client_authority) if file]

    def problems(self) -> list[Problem]:
        """What keeps the files from being used; each field is an option of the command line."""
        problems = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"{self.certificate}, {self.key}"
            remedy = "give a certificate and its unencrypted key as PEM files"
            problems.append(Problem(f"cannot be used ({_reason(error)})", "--tls-cert, --tls-key", files, remedy))
        if self.client_authority:
            try:
                context.load_verify_locations(self.client_authority)
            except (OSError, ValueError) as error:
                message, file = f"cannot be used ({_reason(error)})", str(self.client_authority)
                remedy = "give the authority's certificate as a PEM file"
                problems.append(Problem(message, "--tls-client-ca", file, remedy))
        return problems

    def context(self) -> ssl.SSLContext:
        """The files as Python's TLS takes them."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        if self.client_authority:
            context.load_verify_locations(self.client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
