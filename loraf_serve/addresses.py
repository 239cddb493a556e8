"""Network addresses that the server and the client share, and listening sockets."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from loraf.errors import ConfigError, Problem

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"{DEFAULT_HOST}:{DEFAULT_PORT}"


_OWN_PORTS = {"http": 80, "https": 443}
_SOCKETS = ("unix:", "unix-abstract:")  # gRPC's schemes for Unix sockets, which have no port


def is_socket(host: str) -> bool:
    """Whether `host` is a Unix socket, such as `unix:/run/loraf.sock`."""
    return host.startswith(_SOCKETS)


def is_local(host: str) -> bool:
    """Whether `host` can be reached from this machine only. Of names, only `localhost` is known to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or is_socket(host)


def is_origin(text: str) -> bool:
    """Whether a text is an origin of web pages, as browsers write it: scheme, host and port."""
    parts = urlsplit(text)
    is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    try:
        is_web = is_web and parts.port != _OWN_PORTS.get(parts.scheme)  # which browsers leave out
    except ValueError:
        return False
    return is_web and text == f"{parts.scheme}://{parts.netloc}".lower()


def address_of(host: str, port: int) -> str:
    """The address as gRPC takes it: host:port, or the Unix socket."""
    if is_socket(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of an address that `address_of` returned."""
    return address if is_socket(address) else address.rpartition(":")[0].strip("[]")


def listening_socket(host: str, port: int, option: str, backlog: int) -> socket.socket:
    """A socket that listens, for an asyncio loop.

    Args:
        port: 0 takes a free one.
        option: of the command line, that sets the port.

    Raises:
        ConfigError: the address is in use or not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(backlog)
            listening.setblocking(False)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        message = f"cannot listen on {host}, port {port} ({error.strerror})"
        remedy = "choose another port (0 takes a free one), or stop the program that listens there"
        raise ConfigError(Problem(message, option, remedy=remedy)) from None
    return listening
