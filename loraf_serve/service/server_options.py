"""Where the server listens and how much it admits, with checks. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import Problem
from loraf_serve.addresses import DEFAULT_HOST, DEFAULT_PORT, address_of, is_local, is_origin, is_socket
from loraf_serve.security.tls_files import TlsFiles

DEFAULT_MAX_QUEUE = 1024  # requests
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
DEFAULT_GRACE = 30.0  # seconds
LOG_FORMATS = ("text", "json")
DEFAULT_MAX_CONNECTION_AGE = 3600.0  # seconds
_PORTS = {"--port": "gRPC", "--metrics-port": "metrics"}
_LONGEST_SECONDS = 1e6  # gRPC counts milliseconds in 32 bits


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server's command line.

    Attributes:
        host, port: where to listen; port 0 takes a free one. A Unix socket (unix:/path) has no port.
        tls_cert, tls_key: PEM files; both or neither.
        reflection: offer gRPC reflection.
        vllm_grpc: speak vLLM's own gRPC contract too.
        tls_client_ca: PEM file; clients must then present a certificate signed by this authority.
        insecure: allow other machines to connect without TLS.
        token_file: only clients with one of its tokens may call; None: everybody.
        max_queue: limit on requests in flight, waiting and running.
        max_message_bytes: size limit of a request.
        default_deadline: seconds, for requests that set no deadline; None: no limit.
        grace: seconds that requests in flight may continue after SIGTERM and the drain delay.
        drain_delay: seconds after SIGTERM in which the server says NOT_SERVING but still accepts requests.
        max_connection_age: seconds after which a client is asked to connect again, so that load balancers can share out
            connections; its streams run to their end. 0: never.
        metrics_port: serve metrics for Prometheus on this port of the host, of 127.0.0.1 if that is a Unix socket; 0
            takes a free one. None: no metrics.
        http_port: serve OpenAI's API and a page over HTTP on this port of the host, of 127.0.0.1 if that is a Unix
            socket; 0 takes a free one. None: no HTTP.
        http_allowed_origin: origins of pages that may call over HTTP, beside the server's own.
        tool_call_parser: vLLM's name of a parser for calls of tools in answers to chats; "" for none.
        log_format: one of LOG_FORMATS.
        log_texts: write prompts and answers to the log.
        adapter_memory: limit in bytes for all adapters, in the server's process and in the backend; None: no limit.
        model: name of the base model, as clients may see it.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    reflection: bool = False
    vllm_grpc: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    insecure: bool = False
    token_file: Path | None = None
    max_queue: int = DEFAULT_MAX_QUEUE
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    default_deadline: float | None = None
    grace: float = DEFAULT_GRACE
    drain_delay: float = 0.0
    max_connection_age: float = DEFAULT_MAX_CONNECTION_AGE
    metrics_port: int | None = None
    http_port: int | None = None
    http_allowed_origin: Sequence[str] = ()
    tool_call_parser: str = ""
    log_format: str = "text"
    log_texts: bool = False
    adapter_memory: int | None = None
    model: str = ""

    @property
    def address(self) -> str:
        """As gRPC takes it: host:port, or a Unix socket."""
        return address_of(self.host, self.port)

    @property
    def http_host(self) -> str:
        """Where HTTP is served, of metrics too: the host, or this machine if that is a Unix socket."""
        return DEFAULT_HOST if is_socket(self.host) else self.host

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files; None without TLS."""
        if not (self.tls_cert and self.tls_key):
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    def problems(self) -> list[Problem]:
        """All mistakes; each field is an option of the command line."""
        problems: list[Problem] = []

        def check(holds: bool, field: str, message: str, remedy: str) -> None:
            if not holds:
                problems.append(Problem(message, field, remedy=remedy))

        taken: dict[int, str] = {}
        ports = (("--port", self.port), ("--metrics-port", self.metrics_port), ("--http-port", self.http_port))
        for option, port in ports:
            number = port or 0
            check(0 <= number <= 65535, option, f"{number} is not a port", "use 0 (any free port) to 65535")
            what = _PORTS.get(taken.get(number, ""), "")
            check(not (number and what), option, f"{number} is the port of {what}", "use another port")
            taken.setdefault(number, option)
        for origin in self.http_allowed_origin:
            remedy = "write it as browsers do: https://host, or https://host:port for a port that is not the usual one"
            check(is_origin(origin), "--http-allowed-origin", f"{origin!r} is not an origin", remedy)
        for option, value in (
            ("--http-allowed-origin", self.http_allowed_origin),
            ("--tool-call-parser", self.tool_call_parser),
        ):
            check(not value or self.http_port is not None, option, "is about HTTP", "give --http-port too")
        check(self.max_queue >= 1, "--max-queue", f"{self.max_queue} is out of range", "use at least 1")
        size = self.max_message_bytes
        in_range = 1024 <= size < 1 << 31
        check(in_range, "--max-message-bytes", f"{size} is out of range", "use 1024 to 2147483647")
        deadline = self.default_deadline
        in_range = deadline is None or 0 < deadline < float("inf")
        check(in_range, "--default-deadline", f"{deadline} is out of range", "use a number of seconds above 0")
        for option, seconds in (
            ("--grace", self.grace),
            ("--drain-delay", self.drain_delay),
            ("--max-connection-age", self.max_connection_age),
        ):
            in_range = 0 <= seconds < _LONGEST_SECONDS
            check(in_range, option, f"{seconds} is out of range", "use a number of seconds, at least 0")
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
        return self.tls.problems() if self.tls else []
