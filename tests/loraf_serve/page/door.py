"""A stand-in for the HTTP door: the page, its API, and whatever a test wants it to answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import loraf_serve.page
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder
from loraf_serve.http.report import report_of
from tests.loraf_serve.harness import checkpoint_folder

FOLDER = Path(loraf_serve.page.__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TASKS = ("math", "nlu", "code")


class Door:
    """Answers of a door.

    Attributes:
        answers: model's name → its answer; others get one that names the model.
        token: that requests must bring; "": none.
        backend: that the server is said to have.
        busy: how many requests are refused with 429 first.
        refusals: path → (status, message).
        pause: seconds between the words of an answer.
        requests: bodies that were sent; `tokens`: their Authorization headers.
        running: answers that are being streamed; `stopped`: those that the client left.
    """

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.token = ""
        self.backend = "resident"
        self.busy = 0
        self.has_chat_template = True
        self.refusals: dict[str, tuple[int, str]] = {}
        self.pause = 0.0
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.running = 0
        self.most_running = 0
        self.stopped = 0
        self.scores: list[dict[str, Any]] = []
        self._adapter = CheckpointFolder.read(checkpoint_folder()).served_as("trio")

    def app(self) -> Starlette:
        async def index(request: Request) -> Response:
            return FileResponse(FOLDER / "index.html", headers={"Content-Security-Policy": POLICY})

        async def server(request: Request) -> Response:
            return self._refusal(request) or JSONResponse({"model": "tiny", "backend": self.backend, "limits": []})

        async def adapters(request: Request) -> Response:
            tasks = [{"name": name, "trainedWith": list(TASKS[:i])} for i, name in enumerate(TASKS)]
            sets = [{"name": "support", "tasks": [{"name": "math", "weight": 0.5}, {"name": "nlu", "weight": 1}]}]
            return self._refusal(request) or JSONResponse(
                {"adapters": [{"name": "trio", "tasks": tasks, "sets": sets}]}
            )

        async def report(request: Request) -> Response:
            return self._refusal(request) or JSONResponse(report_of(self._adapter) | {"scores": self.scores})

        async def answer(request: Request) -> Response:
            self.tokens.append(request.headers.get("Authorization", ""))
            if refusal := self._refusal(request):
                return refusal
            body = await request.json()
            if self.busy:
                self.busy -= 1
                return _error(429, "8 requests are in flight, which is the limit", {"Retry-After": "0.2"})
            if "messages" in body and not (self.has_chat_template or body.get("apply_task_template")):
                return _error(400, "messages: the model has no chat template → set apply_task_template")
            self.requests.append(body | {"path": request.url.path})
            headers = {}
            if body.get("apply_task_template"):
                task = body["model"].partition("@")[2]
                headers = {"loraf-prompt": f"task template of {task}" if task in TASKS else "plain"}
            return StreamingResponse(self._stream(body, request), headers=headers, media_type="text/event-stream")

        routes = [
            Route("/", index),
            Route("/loraf/v1/server", server),
            Route("/loraf/v1/adapters", adapters),
            Route("/loraf/v1/adapters/{name}/report", report),
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/completions", answer, methods=["POST"]),
            Mount("/page", StaticFiles(directory=FOLDER)),
        ]
        return Starlette(routes=routes)

    def _refusal(self, request: Request) -> Response | None:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _error(401, "the request has no token, or a wrong one")
        for path, (status, message) in self.refusals.items():
            if request.url.path == path:
                return _error(status, message)
        return None

    async def _stream(self, body: dict[str, Any], request: Request) -> AsyncIterator[str]:
        text = self.answers.get(body["model"], f"the answer of {body['model']}")
        chat = "messages" in body
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            words = text.split(" ")
            for i, word in enumerate(words):
                piece = word if i == 0 else f" {word}"
                choice = {"delta": {"content": piece}} if chat else {"text": piece}
                last = {"finish_reason": "stop" if i == len(words) - 1 else None}
                yield _event({"choices": [choice | last], "system_fingerprint": f"digest-{body['model']}"})
                await asyncio.sleep(self.pause)
            yield _event({"choices": [], "usage": {"completion_tokens": len(words)}})
            yield "data: [DONE]\n\n"
        except BaseException:
            self.stopped += 1
            raise
        finally:
            self.running -= 1


def _event(message: dict[str, Any]) -> str:
    return f"data: {json.dumps(message)}\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


@contextmanager
def opened() -> Iterator[tuple[Door, str]]:
    """A door, and its address."""
    door = Door()
    server = uvicorn.Server(uvicorn.Config(door.app(), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield door, f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)
