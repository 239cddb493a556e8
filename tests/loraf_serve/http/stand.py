"""A server with both doors, in a thread, and clients of OpenAI for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai

from loraf_serve.http.door import HttpDoor
from loraf_serve.service.doors import Inside
from tests.loraf_serve.harness import Running, serving


class Both:
    """A running server.

    Attributes:
        grpc: the server, and gRPC's clients.
        url: of the HTTP door.
        openai: a client without retries; `http`: httpx's.
    """

    def __init__(self, grpc: Running, door: HttpDoor, token: str = "none", verify: object = True):
        self.grpc, self.door = grpc, door
        scheme = "https" if door._inside.options.tls else "http"
        self.url = f"{scheme}://127.0.0.1:{door.port}"
        self.http = httpx.Client(
            base_url=self.url, timeout=60, verify=verify, headers={"Authorization": f"Bearer {token}"}
        )
        self.openai = self.client(token)

    def client(self, token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=60)

    def asynchronous(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)


@contextmanager
def both_doors(*arguments, allowed_origins=(), tool_parser="", token="none", verify=True, **options) -> Iterator[Both]:
    """As `harness.serving`, with the HTTP door."""
    made: list[HttpDoor] = []

    def make_door(inside: Inside) -> HttpDoor:
        made.append(HttpDoor(inside, 0, allowed_origins, tool_parser))
        return made[0]

    with serving(*arguments, doors=[make_door], **options) as running:
        both = Both(running, made[0], token, verify)
        try:
            yield both
        finally:
            both.http.close()
            both.openai.close()


def pause_all(both: Both) -> None:
    """As if the network took nothing any more."""

    async def pause() -> None:
        for connection in both.door._server.server_state.connections:
            connection.flow.pause_writing()

    both.grpc.call(pause())
