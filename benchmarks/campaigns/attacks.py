"""What no gRPC client sends: broken and hostile HTTP/2, within bounds, from this machine to itself.

Each attack is one function of a new connection. None may do more than end its own connection.
"""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Callable

from h2.connection import H2Connection

from benchmarks.campaigns.frames import GENERATE, PREFACE, STREAM, Connection, frame, grpc_message, headers, settings

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
FLOOD = 1000  # frames
Attack = Callable[[Connection, bytes], None]
"""Takes a connection, not yet opened, and the bytes of a valid request."""

ATTACKS: dict[str, Attack] = {}


def _attack(name: str) -> Callable[[Attack], Attack]:
    def add(attack: Attack) -> Attack:
        ATTACKS[name] = attack
        return attack

    return add


def _raw(name: str, *data: bytes, opened: bool = True) -> None:
    """An attack that sends these bytes."""

    def attack(connection: Connection, body: bytes) -> None:
        if opened:
            connection.open()
        for part in data:
            connection.send(part)
        connection.wait(0.3)

    ATTACKS[name] = attack


def _call(name: str, path: str = GENERATE, **replaced: str | None) -> None:
    """An attack that makes a call with other headers."""

    def attack(connection: Connection, body: bytes) -> None:
        connection.open()
        connection.wait(3, connection.call(path, body, **replaced))

    ATTACKS[name] = attack


def _message(name: str, make: Callable[[bytes], bytes], ends: bool = True, **replaced: str | None) -> None:
    """An attack that sends another body."""

    def attack(connection: Connection, body: bytes) -> None:
        connection.open()
        number = connection.begin(GENERATE, **replaced)
        data = make(body)
        for start in range(0, max(len(data), 1), 16_000):
            part = data[start : start + 16_000]
            last = start + 16_000 >= len(data)
            connection.send(frame(DATA, END_STREAM if ends and last else 0, number, part))
        connection.wait(3 if ends else 0.5, number)

    ATTACKS[name] = attack


# --- the beginning of a connection

_raw("nothing", opened=False)
_raw("noise", random.Random(0).randbytes(4096), opened=False)
_raw("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", opened=False)
_raw("half of the preface", PREFACE[:12], opened=False)
_raw("the preface twice", PREFACE, PREFACE, opened=False)
_raw("a TLS greeting", bytes.fromhex("160301020001000001fc0303"), opened=False)
_raw("no settings", PREFACE, frame(PING, 0, 0, b"12345678"), opened=False)

# --- malformed frames

_raw("a frame that claims 16 MiB", frame(DATA, 0, 1, b"x", length=(1 << 24) - 1))
_raw("an unknown kind of frame", frame(0xEE, 0xFF, 1, b"x" * 100))
_raw("headers of stream 0", frame(HEADERS, END_HEADERS, 0, b"\x82"))
_raw("headers of an even stream", frame(HEADERS, END_HEADERS, 2, b"\x82"))
_raw("data of an idle stream", frame(DATA, END_STREAM, 7, b"x"))
_raw("data of stream 0", frame(DATA, 0, 0, b"x"))
_raw("settings of a wrong size", frame(SETTINGS, 0, 0, b"12345"))
_raw("settings of a stream", frame(SETTINGS, 0, 1, b""))
_raw("settings with wrong values", frame(SETTINGS, 0, 0, settings([(4, 2**32 - 1), (5, 1), (2, 7)])))
_raw("an unknown setting", frame(SETTINGS, 0, 0, settings([(0xFFFF, 1)])))
_raw("a window of 0", frame(WINDOW, 0, 0, struct.pack(">I", 0)))
_raw("a window that overflows", *[frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1))] * 2)
_raw("a ping of a wrong size", frame(PING, 0, 0, b"123"))
_raw("a push promise", frame(PUSH, END_HEADERS, 1, struct.pack(">I", 2) + b"\x82"))
_raw("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, b"\x82"))
_raw("data between headers", frame(HEADERS, 0, 1, b"\x82"), frame(DATA, 0, 1, b"x"))
_raw("broken header compression", frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff" * 40))
_raw("a reset of an idle stream", frame(RST, 0, 9, struct.pack(">I", 8)))
_raw("farewell, and then a call", frame(GOAWAY, 0, 0, struct.pack(">II", 0, 0)), frame(HEADERS, 5, 1, b"\x82"))
_raw("padding longer than the frame", frame(DATA, 8, 1, b"\xffx"))

# --- headers

for _type in ("text/plain", "application/json", "application/grpc-web", "application/grpc+json", ""):
    _call(f"content type {_type!r}", content_type=_type)
_call("no content type", content_type=None)
_call("no te", te=None)
_call("another method of HTTP", method="GET")
_call("an unknown method", "/loraf.v1.GenerationService/Nothing")
_call("an unknown service", "/x.Y/Z")
_call("a path that is no method", "//../etc/passwd")
_call("a long path", "/" + "a" * 6000)
_call("no scheme", scheme=None)
_call("no authority", authority=None)
for _timeout in ("abc", "-1S", "0n", "1n", "99999999H", "999999999999S", ""):
    _call(f"timeout {_timeout!r}", grpc_timeout=_timeout)
_call("an unknown encoding", grpc_encoding="rot13")
_call("encodings of the client", grpc_accept_encoding="rot13,,;q=7")
_call("metadata of 7 kB", x_long="a" * 7000)
_call("metadata of 15 kB", x_long="a" * 15_000)
_call("binary metadata that is not base64", x_bin="***")
_call("capitals in a name", X_Capital="a")
_call("an authorization of no kind", authorization="\x7f" * 100)


@_attack("headers of a megabyte")
def _huge_headers(connection: Connection, body: bytes) -> None:
    connection.open()
    block = connection.state.encoder.encode(headers(GENERATE))
    block += b"".join(b"\x00\x08x-long%02d\x7f\x81\x7e" % i + b"a" * 16_384 for i in range(64))
    parts = [block[i : i + 16_000] for i in range(0, len(block), 16_000)]
    connection.send(frame(HEADERS, 0, 1, parts[0]))
    for part in parts[1:-1]:
        connection.send(frame(CONTINUATION, 0, 1, part))
    connection.send(frame(CONTINUATION, END_HEADERS, 1, parts[-1]))
    connection.wait(1, 1)


def path_block(state: H2Connection) -> bytes:
    """The headers of a call whose path is not UTF-8."""
    block = [(name.encode(), value.encode()) for name, value in headers(GENERATE)]
    return state.encoder.encode([(name, b"/\x83\xd8" if name == b":path" else value) for name, value in block])


@_attack("a path that is not UTF-8")
def _not_utf8(connection: Connection, body: bytes) -> None:
    connection.open()
    connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, path_block(connection.state)))
    connection.wait(0.5, 1)


# --- messages

_message("no message", lambda body: b"")
_message("half of a prefix", lambda body: b"\0\0\0")
_message("half of a message", lambda body: grpc_message(body)[:-3])
_message("a message that claims 4 GiB", lambda body: grpc_message(body, length=2**32 - 1))
_message("a message that claims 4 MiB and never comes", lambda body: grpc_message(body, length=4 << 20), ends=False)
_message("a message of 5 MiB", lambda body: grpc_message(bytes(5 << 20)))
_message("an unknown flag", lambda body: grpc_message(body, flag=7))
_message("compressed, in no encoding", lambda body: grpc_message(body, flag=1))
_message("compressed, and not gzip", lambda body: grpc_message(b"noise", flag=1), grpc_encoding="gzip")
_message(
    "a small message of 32 MiB", lambda body: grpc_message(gzip.compress(bytes(32 << 20)), 1), grpc_encoding="gzip"
)
_message("two messages", lambda body: 2 * grpc_message(body))
_message("bytes that are no message", lambda body: grpc_message(b"\x0a\xff\xff\xff"))
_message("nested without end", lambda body: grpc_message(_nested(2000)))
_message("headers only", lambda body: b"", ends=False)


def _nested(levels: int) -> bytes:
    """A field within itself, as often as that: protobuf's parsers allow a hundred."""
    data = b""
    for _ in range(levels):
        size, length = len(data), bytearray()
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        data = b"\x1a" + bytes([*length, size]) + data
    return data


# --- floods


def _flood(name: str, make: Callable[[int], bytes]) -> None:
    def attack(connection: Connection, body: bytes) -> None:
        connection.open()
        for start in range(0, FLOOD, 50):
            connection.send(b"".join(make(i) for i in range(start, start + 50)))
            connection.receive(0.0)
            if connection.closed:
                return
        connection.wait(0.3)

    ATTACKS[f"{FLOOD} {name}"] = attack


_flood("settings", lambda i: frame(SETTINGS, 0, 0))
_flood("settings that change the window", lambda i: frame(SETTINGS, 0, 0, settings([(4, 1 + i)])))
_flood("pings", lambda i: frame(PING, 0, 0, struct.pack(">Q", i)))
_flood("priorities", lambda i: frame(PRIORITY, 0, 2 * i + 1, struct.pack(">IB", 0, 16)))
_flood("windows of a byte", lambda i: frame(WINDOW, 0, 0, struct.pack(">I", 1)))
_flood("continuations without end", lambda i: frame(CONTINUATION if i else HEADERS, 0, 1))


@_attack(f"{FLOOD} calls that are reset at once")
def _resets(connection: Connection, body: bytes) -> None:
    connection.open()
    for _ in range(FLOOD):
        number = connection.begin(STREAM)
        connection.state.send_data(number, grpc_message(body), end_stream=True)
        connection.state.reset_stream(number, 8)
        connection.flush()
        connection.receive(0.0)
        if connection.closed or connection.going_away:
            return
    connection.wait(0.3)


@_attack("300 calls that are never completed")
def _half_open(connection: Connection, body: bytes) -> None:
    connection.open()
    for _ in range(300):
        connection.begin(STREAM)
        connection.receive(0.0)
        if connection.closed or connection.going_away:
            return
    connection.wait(0.3)


@_attack("1,000 empty data frames")
def _empty_data(connection: Connection, body: bytes) -> None:
    connection.open()
    number = connection.begin(GENERATE)
    connection.send(frame(DATA, 0, number) * FLOOD)
    connection.wait(0.5, number)


@_attack("a call byte by byte")
def _byte_by_byte(connection: Connection, body: bytes) -> None:
    connection.open()
    number = connection.begin(GENERATE)
    data = grpc_message(body)
    for i in range(len(data)):
        connection.send(frame(DATA, END_STREAM if i + 1 == len(data) else 0, number, data[i : i + 1]))
    connection.wait(5, number)


@_attack("a window of nothing")
def _no_window(connection: Connection, body: bytes) -> None:
    """The client never lets the server send an answer."""
    connection.send(PREFACE + frame(SETTINGS, 0, 0, settings([(4, 0)])))
    block = connection.state.encoder.encode(headers(STREAM))
    connection.send(frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, grpc_message(body)))
    connection.wait(0.5)


def valid_bytes(body: bytes, path: str = GENERATE) -> bytes:
    """Everything that a client sends for one call."""
    state = H2Connection()
    state.initiate_connection()
    state.send_headers(1, headers(path))
    state.send_data(1, grpc_message(body), end_stream=True)
    return state.data_to_send()


def damaged(data: bytes, source: random.Random) -> bytes:
    """The bytes with a few changed, left out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed) or 1)
        way = source.randrange(4)
        if way == 0 and changed:
            changed[place] ^= 1 << source.randrange(8)
        elif way == 1:
            del changed[place : place + source.randint(1, 8)]
        elif way == 2:
            changed[place:place] = changed[place : place + source.randint(1, 40)]
        else:
            changed[place:place] = source.randbytes(source.randint(1, 12))
    return bytes(changed)
