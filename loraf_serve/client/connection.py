"""How a client reaches its server: address, TLS, token, retries. Opens the channels of both clients.

gRPC itself retries (service config): a call that was refused or lost before its response began is sent again, after the
server's `grpc-retry-pushback-ms` if it sent one. Only calls that change nothing are sent again. LoadAdapter and
UnloadAdapter are not: after a lost connection, nobody knows whether the first attempt has changed something, and the
second would then be refused. Neither is a health check, which tells how the server is now.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import grpc

from loraf_serve.addresses import DEFAULT_ADDRESS, host_of, is_local
from loraf_serve.v1 import adapter_pb2, generation_pb2, info_pb2

DEFAULT_RETRIES = 3
MOST_RETRIES = 4  # gRPC makes at most 5 attempts, whatever it is told
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 2.0  # seconds, doubled each time; half as long or as long again at random
_RETRY_BUFFER_BYTES = 4 << 20  # a longer request is sent once; the server takes no longer one by default
_LONGEST_RECONNECT_MS = 2000  # between attempts to connect
# A server that vanished silently is noticed after both times. During calls only; servers allow a ping every 5 s.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # RFC 6750's bearer tokens


class Connection:
    """Base class of the clients: where the server is, and how to talk to it.

    Attributes:
        address: host:port, or a Unix socket (unix:/path).
        timeout: seconds for each request, None for no limit.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        token: str | None = None,
        insecure_token: bool = False,
        timeout: float | None = None,
        retries: int = DEFAULT_RETRIES,
    ):
        self.address = address
        self.timeout = timeout
        if isinstance(retries, bool) or retries not in range(MOST_RETRIES + 1):
            raise ValueError(f"retries={retries!r} is out of range; use 0 to {MOST_RETRIES}")
        local = is_local(host_of(address))
        self._options = _channel_options(retries, local)
        self._credentials: grpc.ChannelCredentials | None = None
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._secure(tls, tls_ca, tls_cert, tls_key)
        if token is not None:
            self._authorize(token, local or insecure_token)
        self._open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def _open(self) -> None:
        """Opens the channel, if the client does not wait for its first call."""

    def _secure(
        self, tls: bool, tls_ca: str | Path | None, tls_cert: str | Path | None, tls_key: str | Path | None
    ) -> None:
        if tls or tls_ca or tls_cert:
            parts = [Path(file).read_bytes() if file else None for file in (tls_ca, tls_key, tls_cert)]
            self._credentials = grpc.ssl_channel_credentials(*parts)

    def _authorize(self, token: str, in_clear: bool) -> None:
        if not _TOKEN.fullmatch(token):  # the message must not contain it
            raise ValueError("the token is empty, or has characters that a bearer token cannot have")
        if self._credentials:
            call_credentials = grpc.access_token_call_credentials(token)
            self._credentials = grpc.composite_channel_credentials(self._credentials, call_credentials)
        elif in_clear:
            self._metadata = (("authorization", f"Bearer {token}"),)
        else:
            raise ValueError(
                f"the token would cross the network to {self.address} unencrypted; connect over TLS, or allow it "
                "by insecure_token if everybody on the way is trusted"
            )

    def _limits(self, timeout: float | None) -> dict[str, Any]:
        """The keyword arguments of every call."""
        return {"timeout": self.timeout if timeout is None else timeout, "metadata": self._metadata}


def _channel_options(retries: int, local: bool) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # until the network acknowledges a ping
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # until the server answers it
        ("grpc.http2.max_pings_without_data", 0),  # no limit: while an answer is awaited, the client sends no data
    ]
    if local:
        options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's loopback
    if retries:
        options.append(("grpc.service_config", json.dumps(service_config(retries))))
    return options


def service_config(retries: int) -> dict[str, Any]:
    """What gRPC's service config says: which methods are retried, and when. `retries` is at least 1."""
    adapters = _name(adapter_pb2, "AdapterService")
    return {
        "methodConfig": [
            {
                "name": [
                    {"service": _name(generation_pb2, "GenerationService")},
                    {"service": adapters, "method": "ListAdapters"},
                    {"service": adapters, "method": "GetAdapter"},
                    {"service": _name(info_pb2, "InfoService")},
                ],
                "retryPolicy": {
                    "maxAttempts": retries + 1,
                    "initialBackoff": f"{_FIRST_BACKOFF}s",
                    "maxBackoff": f"{_LONGEST_BACKOFF}s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }


def _name(module: Any, service: str) -> str:
    return str(module.DESCRIPTOR.services_by_name[service].full_name)
