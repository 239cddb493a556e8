"""How the server listens and what it admits, and what is wrong with that. Standard library only."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import Problem


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
        host, port: where to listen; port 0 takes a free one.
        tls_cert, tls_key: PEM files; both or neither.
        tls_client_ca: PEM file; clients must then bring a certificate signed by it.
        insecure: listen beyond this machine without TLS.
        max_queue: requests in flight at most, waiting and running.
        max_message_bytes: largest request.
        default_deadline: seconds, for requests without a deadline of their own; None: none.
        grace: seconds that requests in flight may go on after SIGTERM.
        adapter_memory: bytes that adapters may take in all, in the server's process and in the backend; None: no limit.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    insecure: bool = False
    max_queue: int = 1024
    max_message_bytes: int = 4 << 20
    default_deadline: float | None = None
    grace: float = 30.0
    adapter_memory: int | None = None

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def problems(self) -> list[Problem]:
        """Everything that is wrong, fields as on the command line."""
        found: list[Problem] = []

        def check(holds: bool, field: str, message: str, remedy: str) -> None:
            if not holds:
                found.append(Problem(message, field, remedy=remedy))

        check(0 <= self.port <= 65535, "--port", f"{self.port} is no port", "use 0 (any free one) to 65535")
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
        found += self._tls_problems()
        if not self.tls_cert and not self.insecure:
            remedy = "give --tls-cert and --tls-key, or say --insecure if the network is trusted"
            message = f"{self.host} can be reached from other machines, and there is no TLS"
            check(is_loopback(self.host), "--host", message, remedy)
        return found

    def _tls_problems(self) -> list[Problem]:
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            return [Problem(f"{given} is given without it", missing, remedy="give both")]
        if not self.tls_cert:
            if self.tls_client_ca:
                remedy = "give --tls-cert and --tls-key as well"
                return [Problem("clients can be checked only over TLS", "--tls-client-ca", remedy=remedy)]
            return []
        found = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"{self.tls_cert}, {self.tls_key}"
            remedy = "give a certificate and its unencrypted key as PEM files"
            found.append(Problem(f"cannot be used ({_reason(error)})", "--tls-cert, --tls-key", files, remedy))
        if self.tls_client_ca:
            try:
                context.load_verify_locations(self.tls_client_ca)
            except (OSError, ValueError) as error:
                message, file = f"cannot be used ({_reason(error)})", str(self.tls_client_ca)
                found.append(
                    Problem(message, "--tls-client-ca", file, "give the authority's certificate as a PEM file")
                )
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than `localhost` may mean anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
