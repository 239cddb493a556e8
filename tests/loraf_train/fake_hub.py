"""A Hugging Face hub in this process, over HTTP: the part of its API that transfers small files.

The client is the real `huggingface_hub`, and every commit is a whole snapshot. It finds a push that needs several
commits (so that others could see half a checkpoint), that uploads files it should not, or that leaves old files behind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class Hub:
    """Repositories: name → commits, each a mapping of paths to bytes. Only `token` may write."""

    def __init__(self, token: str = "hf_writer"):
        self.token = token
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.created: list[dict] = []
        self.url = ""

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a commit; of the last one for main. Raises KeyError for another revision."""
        commits = self.commits[repository]
        return (
            commits[-1]
            if revision == "main"
            else {self.oid(repository, i + 1): c for i, c in enumerate(commits)}[revision]
        )

    def oid(self, repository: str, count: int | None = None) -> str:
        """The id of a repository's commit number `count`, by default its last."""
        return hashlib.sha1(f"{repository}{count or len(self.commits[repository])}".encode()).hexdigest()


@contextmanager
def served(monkeypatch, folder, hub: Hub | None = None):
    """A context in which `huggingface_hub` talks to this hub, with its cache in `folder`."""
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(folder / "hub")}
    for name, value in (constants | {"HF_HUB_OFFLINE": False, "HF_TOKEN_PATH": str(folder / "token")}).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Logs nothing."""

    def answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":  # of a README.md, before it is sent
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            self.answer(200, {"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+/preupload/main", self.path.partition("?")[0]):
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path.partition("?")[0]):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.missing("RevisionNotFound")

    def create(self, request: dict) -> None:
        name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.commits:
            self.answer(409, url)
            return
        self.hub.created.append(request)
        self.hub.commits[name] = [{".gitattributes": b""}]
        self.answer(200, url)

    def commit(self, name: str, lines: list[dict]) -> None:
        files = dict(self.hub.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits[name].append(files)
        oid = self.hub.oid(name)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(tree|revision)/([^/]+)", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        name = (listing or file or [None, None])[1]
        if name not in self.hub.commits:
            self.missing("RepoNotFound")
            return
        revision = listing[3] if listing else file[2]
        try:
            files = self.hub.files(name, revision)
        except KeyError:
            self.missing("RevisionNotFound")
            return
        oid = self.hub.oid(name) if revision == "main" else revision
        if file:
            content = files.get(file[3])
            if content is None:
                self.missing("EntryNotFound")
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})
        elif listing[2] == "tree":
            self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": oid, "siblings": siblings, "private": False})

    do_HEAD = do_GET
