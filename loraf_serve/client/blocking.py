"""The client whose methods wait for the response."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc

from loraf_serve.client import calls
from loraf_serve.client.connection import Connection
from loraf_serve.client.errors import DeadlineExceeded, ServiceError, Unavailable, service_error
from loraf_serve.client.request_message import request_of
from loraf_serve.client.results import AdapterList, Answer, ServerInfo
from loraf_serve.client.streams import Stream
from loraf_serve.v1 import adapter_pb2, generation_pb2

T = TypeVar("T")


class Client(Connection):
    """A connection to a server. Use it as a context manager, or call `close`. Safe to use from several threads.

    Args:
        address: host:port, or a Unix socket (unix:/path).
        tls: connect over TLS, and trust the system's authorities.
        tls_ca: PEM file of the authority that signed the server's certificate; implies `tls`.
        tls_cert, tls_key: PEM files of this client's certificate and private key, if the server requires one.
        token: bearer token, if the server requires one. Needs TLS, or a server on this machine.
        insecure_token: send the token to another machine without TLS; whoever can read the traffic can use it.
        timeout: seconds for each request, None for no limit; every method can override it.
        retries: how often a request that changes nothing is sent again, from 0 to 4, if the server cannot be reached,
            is unavailable or has a full queue. A stream is not sent again once its first piece has arrived.

    Raises:
        ValueError: `retries` is out of range, or the token would be sent unencrypted.
        OSError: a PEM file cannot be read.
    """

    def _open(self) -> None:
        if self._credentials:
            self._channel = grpc.secure_channel(self.address, self._credentials, self._options)
        else:
            self._channel = grpc.insecure_channel(self.address, self._options)
        self._stubs = calls.Stubs(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def generate(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> Answer:
        """Generates one answer (or `n`) and returns it when it is complete.

        Args:
            prompt: text; alternatively give `messages` or `prompt_token_ids`.
            timeout: seconds.
            **request: see `request_of`.

        Raises:
            ServiceError: the server refused the request, failed, or cannot be reached.
        """
        return self._call(calls.generate(prompt, request), timeout)

    def stream(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> Stream:
        """Yields the answer in pieces, as it is generated. Arguments and errors as `generate`.

        Leaving the loop early, or closing the stream, cancels the request.
        """
        message = request_of(generation_pb2.StreamGenerateRequest, prompt, **request)
        method, limits = self._stubs.generation.StreamGenerate, self._limits(timeout)
        return Stream(lambda: method(message, **limits), self.address)

    def adapters(self, *, timeout: float | None = None) -> AdapterList:
        """Lists the loaded adapters. Raises ServiceError."""
        return self._call(calls.list_adapters(), timeout)

    def load_adapter(
        self,
        name: str,
        path: str,
        tasks: Sequence[str] | None = None,
        replace: bool = False,
        *,
        timeout: float | None = None,
    ) -> adapter_pb2.Adapter:
        """Loads a checkpoint under a name while the server continues to serve. Is not retried.

        Args:
            path: the checkpoint's folder, relative to the server's `--adapter-root`.
            tasks: load only these; None for all.
            replace: replace the adapter of this name; running requests end on the old content.

        Raises:
            ServiceError: nothing has changed. FailedPrecondition: the server has no `--adapter-root`; AlreadyExists:
                the name is taken; ResourceExhausted: the server has no memory for it. After Unavailable or
                DeadlineExceeded, `adapters` tells whether it was loaded.
        """
        return self._call(calls.load_adapter(name, path, tasks, replace), timeout)

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> adapter_pb2.UnloadAdapterResponse:
        """Unloads an adapter. The response names what still needs its content; if nothing does, its memory is freed.

        Is not retried.

        Raises:
            ServiceError: FailedPrecondition: the server has no `--adapter-root`; NotFound: there is no such adapter.
        """
        return self._call(calls.unload_adapter(name), timeout)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns what the server is and what it admits: model, backend, versions, limits. Raises ServiceError."""
        return self._call(calls.server_info(), timeout)

    def health(self, *, timeout: float | None = None) -> str:
        """Returns "SERVING", or "NOT_SERVING" while the server loads or drains, or when its engine is gone.

        Is not retried: it tells how the server is now.

        Raises:
            ServiceError: the server cannot be reached.
        """
        return self._call(calls.health(), timeout)

    def wait_until_serving(self, timeout: float | None = None) -> None:
        """Waits until the server serves, also if it does not listen yet.

        Args:
            timeout: seconds; None for no limit.

        Raises:
            DeadlineExceeded: it did not serve in time; the text says what it did instead.
        """
        waiting = calls.Waiting(timeout)
        while (outcome := self._probe(waiting.probe_seconds())) != calls.SERVING:
            time.sleep(waiting.pause_after(outcome))

    def _probe(self, timeout: float) -> str | ServiceError:
        try:
            return self.health(timeout=timeout)
        except (Unavailable, DeadlineExceeded) as error:
            return error

    def _call(self, call: calls.UnaryCall[T], timeout: float | None) -> T:
        try:
            response = call.method(self._stubs)(call.request, **self._limits(timeout))
        except grpc.RpcError as error:
            raise service_error(error, self.address) from None
        return call.read(response)
