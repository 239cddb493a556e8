"""Runs `loraf-serve` as a child process, for notebooks, examples and tests.

    with launch("tiny", "./ckpt") as server:
        print(server.client.generate("Reverse: kitten\\n", tasks=["math"]).text)

Leaving the `with` block stops the server.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from loraf_serve.client import Client

_LISTENING = re.compile(r"listening on (\S+)")
_HTTP = re.compile(r"OpenAI's API on (\S+)")


class ServerFailed(RuntimeError):
    """The server exited or timed out before it listened. The text ends with its last lines of output."""


class Server:
    """A running `loraf-serve`.

    Attributes:
        address: host:port, or a Unix socket.
        http: URL of the HTTP door; "" without `--http-port`.
        client: a client connected to it; for asyncio, make an `AsyncClient` for `address`.
        log: the last 200 lines of its output.
    """

    def __init__(
        self, arguments: list[str], start_timeout: float, echo: IO[str] | None, client: Mapping[str, Any] | None = None
    ):
        self.log: deque[str] = deque(maxlen=200)
        self.address = self.http = ""
        self._listening = threading.Event()
        command = [sys.executable, "-m", "loraf_serve.cli", *arguments]
        # In its own session: Ctrl-C in the parent must not reach the engine before the server has drained.
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, args=(echo,), daemon=True)
        self._reader.start()
        if not self._listening.wait(start_timeout) or not self.address:
            self._process.kill()
            self._process.wait()
            self._reader.join(5)
            raise ServerFailed("loraf-serve did not start:\n" + "\n".join(self.log))
        try:
            self.client = Client(self.address, **(client or {}))
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _read(self, echo: IO[str] | None) -> None:
        for line in self._process.stdout or ():
            self.log.append(line.rstrip("\n"))
            if echo:
                echo.write(line)
                echo.flush()
            if http := _HTTP.search(line):
                self.http = http[1]
            match = _LISTENING.search(line)
            if match:
                self.address = match[1]
                self._listening.set()
        self._listening.set()  # the process has ended: stop waiting

    def stop(self, timeout: float = 60.0) -> int:
        """Sends SIGTERM: the server finishes its requests and exits.

        Args:
            timeout: seconds.

        Returns:
            The exit status, 0 after a clean stop.

        Raises:
            subprocess.TimeoutExpired: the server did not exit in time; it has been killed.
        """
        if self._process.poll() is None:
            self.client.close()
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def launch(
    model: str,
    *adapters: str,
    options: tuple[str, ...] = (),
    start_timeout: float = 600.0,
    echo: IO[str] | None = None,
    client: Mapping[str, Any] | None = None,
) -> Server:
    """Starts `loraf-serve` on a free port of this machine and waits until it serves.

    Args:
        model, adapters: values of `--model` and `--adapter`.
        options: further options of `loraf-serve`.
        start_timeout: seconds.
        echo: stream that the server's output is copied to.
        client: further arguments of `Client`, such as {"token": "…"} for a server with `--token-file`.

    Raises:
        ServerFailed: the server did not start; the text ends with its last lines of output.
    """
    arguments = ["--model", model, "--port", "0", *options]
    for adapter in adapters:
        arguments += ["--adapter", adapter]
    return Server(arguments, start_timeout, echo, client)
