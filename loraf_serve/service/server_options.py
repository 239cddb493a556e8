"""Where the server listens and how much it admits, with checks. Standard library only."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import Problem
from loraf_serve.addresses import DEFAULT_HOST, DEFAULT_PORT, address_of, is_local

DEFAULT_MAX_QUEUE = 1024  # requests
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
DEFAULT_GRACE = 30.0  # seconds


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server's command line.

    Attributes:
        host, port: where to listen; port 0 takes a free one. A Unix socket (unix:/path) has no port.
        tls_cert, tls_key: PEM files; both or neither.
        reflection: offer gRPC reflection.
        tls_client_ca: PEM file; clients must then present a certificate signed by this authority.
        insecure: allow other machines to connect without TLS.
        max_queue: limit on requests in flight, waiting and running.
        max_message_bytes: size limit of a request.
        default_deadline: seconds, for requests that set no deadline; None: no limit.
        grace: seconds that requests in flight may continue after SIGTERM.
        adapter_memory: limit in bytes for all adapters, in the server's process and in the backend; None: no limit.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    reflection: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    insecure: bool = False
    max_queue: int = DEFAULT_MAX_QUEUE
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    default_deadline: float | None = None
    grace: float = DEFAULT_GRACE
    adapter_memory: int | None = None

    @property
    def address(self) -> str:
        """As gRPC takes it: host:port, or a Unix socket."""
        return address_of(self.host, self.port)

    def problems(self) -> list[Problem]:
        """All mistakes; each field is an option of the command line."""
        problems: list[Problem] = []

        def check(holds: bool, field: str, message: str, remedy: str) -> None:
            if not holds:
                problems.append(Problem(message, field, remedy=remedy))

        check(0 <= self.port <= 65535, "--port", f"{self.port} is not a port", "use 0 (any free port) to 65535")
        check(self.max_queue >= 1, "--max-queue", f"{self.max_queue} is out of range", "use at least 1")
        size = self.max_message_bytes
        in_range = 1024 <= size < 1 << 31
        check(in_range, "--max-message-bytes", f"{size} is out of range", "use 1024 to 2147483647")
        deadline = self.default_deadline
        in_range = deadline is None or 0 < deadline < float("inf")
        check(in_range, "--default-deadline", f"{deadline} is out of range", "use a number of seconds above 0")
        in_range = 0 <= self.grace < float("inf")
        check(in_range, "--grace", f"{self.grace} is out of range", "use a number of seconds, at least 0")
        in_range = self.adapter_memory is None or self.adapter_memory >= 1
        check(in_range, "--adapter-memory", f"{self.adapter_memory} is out of range", "use at least 1 byte")
        problems += self._tls_problems()
        if not self.tls_cert and not self.insecure:
            remedy = "give --tls-cert and --tls-key, or --insecure if the network is trusted"
            message = f"{self.host} can be reached from other machines, and there is no TLS"
            check(is_local(self.host), "--host", message, remedy)
        return problems

    def _tls_problems(self) -> list[Problem]:
        if bool(self.tls_cert) != bool(self.tls_key):
            present, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            return [Problem(f"is missing, and {present} requires it", missing, remedy="give both")]
        if not self.tls_cert:
            if self.tls_client_ca:
                remedy = "give --tls-cert and --tls-key as well"
                return [Problem("client certificates require TLS", "--tls-client-ca", remedy=remedy)]
            return []
        problems = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"{self.tls_cert}, {self.tls_key}"
            remedy = "give a certificate and its unencrypted key as PEM files"
            problems.append(Problem(f"cannot be used ({_reason(error)})", "--tls-cert, --tls-key", files, remedy))
        if self.tls_client_ca:
            try:
                context.load_verify_locations(self.tls_client_ca)
            except (OSError, ValueError) as error:
                message, file = f"cannot be used ({_reason(error)})", str(self.tls_client_ca)
                remedy = "give the authority's certificate as a PEM file"
                problems.append(Problem(message, "--tls-client-ca", file, remedy))
        return problems


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
