"""An HTTP/2 connection whose frames are made by hand: for calls that end rudely, and frames that no client sends."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable
from typing import NamedTuple

import h2.config
import h2.events
from h2.connection import H2Connection
from h2.exceptions import ProtocolError

GENERATE = "/loraf.v1.GenerationService/Generate"
STREAM = "/loraf.v1.GenerationService/StreamGenerate"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame as it is on the wire.

    Args:
        length: what its header says; None for the truth.
    """
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def grpc_message(body: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """A message with gRPC's prefix."""
    return bytes([flag]) + struct.pack(">I", len(body) if length is None else length) + body


def headers(path: str, **replaced: str | None) -> list[tuple[str, str]]:
    """The headers of a call.

    Args:
        replaced: other values, with `_` for `-`; None leaves a header out. `method`, `scheme`, … are HTTP/2's own.
    """
    usual = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": path}
    usual |= {"te": "trailers", "content-type": "application/grpc"}
    for name, value in replaced.items():
        key = f":{name}" if f":{name}" in usual else name.replace("_", "-")
        usual.pop(key, None)
        if value is not None:
            usual[key] = value
    # Those of HTTP/2 come first.
    return sorted(usual.items(), key=lambda item: not item[0].startswith(":"))


class Status(NamedTuple):
    """The end of a call.

    Attributes:
        code: number of the status.
        by_service: the service ended the call, not gRPC's core before it reached the service.
    """

    code: str
    message: str
    by_service: bool


class Connection:
    """A connection to a server on this machine.

    Attributes:
        events: everything that the server has sent.
        closed: the server has closed it.
    """

    def __init__(self, address: str, timeout: float = 5.0):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=timeout)
        # What is sent is not checked: much of it is wrong on purpose.
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.state = H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.closed = False
        self._next = 1

    def open(self) -> None:
        """Begins with the preface and settings, as a client does."""
        self.state.initiate_connection()
        self.flush()

    def call(self, path: str, body: bytes, **replaced: str | None) -> int:
        """Sends a whole call. Returns the number of its stream."""
        number = self.begin(path, **replaced)
        self.state.send_data(number, grpc_message(body), end_stream=True)
        self.flush()
        return number

    def begin(self, path: str, **replaced: str | None) -> int:
        """Sends the headers of a call. Returns the number of its stream."""
        number, self._next = self._next, self._next + 2
        self.state.send_headers(number, headers(path, **replaced))
        self.flush()
        return number

    def flush(self) -> None:
        """Sends what is ready."""
        self.send(self.state.data_to_send())

    def send(self, data: bytes) -> None:
        """Sends bytes as they are. No-op if the server has closed the connection."""
        try:
            self._socket.sendall(data)
        except (ConnectionError, TimeoutError):
            self.closed = True

    def receive(self, seconds: float) -> bool:
        """Reads what arrives within `seconds`. Returns whether anything did."""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return False
        except ConnectionError:
            self.closed = True
            return False
        if not data:
            self.closed = True
            return False
        try:
            self.events += self.state.receive_data(data)
        except ProtocolError:  # what the server says to broken frames need not fit our own state
            return True
        with contextlib.suppress(ProtocolError):
            for event in self.events[-8:]:
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    self.state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self.flush()
        return True

    def wait(self, seconds: float, number: int | None = None) -> None:
        """Reads until the stream of that number, or the connection, has ended, for at most so long."""
        deadline = time.monotonic() + seconds
        while not self.closed and (left := deadline - time.monotonic()) > 0:
            if number is not None and self.ended(number):
                return
            self.receive(left)

    def ended(self, number: int) -> bool:
        """Whether the server has ended a stream."""
        kinds = (h2.events.StreamEnded, h2.events.StreamReset)
        return any(isinstance(event, kinds) and event.stream_id == number for event in self.events)

    def pieces(self, number: int) -> int:
        """How many frames with data a stream has got."""
        return sum(isinstance(event, h2.events.DataReceived) and event.stream_id == number for event in self.events)

    @property
    def going_away(self) -> bool:
        """Whether the server has said that it ends the connection."""
        return any(isinstance(event, h2.events.ConnectionTerminated) for event in self.events)

    def statuses(self) -> list[Status]:
        """Every status that has arrived."""
        found = []
        for event in self.events:
            if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                block = {text(name): text(value) for name, value in event.headers or ()}
                if "grpc-status" in block:
                    by_service = "loraf-request-id" in block
                    found.append(Status(block["grpc-status"], block.get("grpc-message", ""), by_service))
        return found

    def kill(self) -> None:
        """Ends the connection with a reset instead of a farewell, as a crashed client's host does."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def text(value: bytes | str) -> str:
    """A header's name or value as text."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def settings(pairs: Iterable[tuple[int, int]]) -> bytes:
    """The payload of a SETTINGS frame."""
    return b"".join(struct.pack(">HI", key, value) for key, value in pairs)
