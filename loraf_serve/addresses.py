"""Network addresses that the server and the client share. Standard library only."""

from __future__ import annotations

import ipaddress

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"{DEFAULT_HOST}:{DEFAULT_PORT}"


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


def address_of(host: str, port: int) -> str:
    """The address as gRPC takes it: host:port, or the Unix socket."""
    if is_socket(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of an address that `address_of` returned."""
    return address if is_socket(address) else address.rpartition(":")[0].strip("[]")
