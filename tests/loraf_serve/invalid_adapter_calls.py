"""The kinds of invalid calls of AdapterService, each with the code and the field that it is refused with.

They hold for a server with --adapter-root, as `invalid_requests` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from loraf_serve.v1 import adapter_pb2


@dataclass(frozen=True)
class InvalidAdapterCall:
    """A call that is refused.

    Attributes:
        method: of AdapterService.
        code: name of the status; field: that its text begins with.
    """

    name: str
    method: str
    request: Message
    code: str
    field: str


def _load(**fields: Any) -> adapter_pb2.LoadAdapterRequest:
    return adapter_pb2.LoadAdapterRequest(**{"name": "new", **fields})


def adapter_calls(path: str) -> list[InvalidAdapterCall]:
    """Every kind for AdapterService.

    Args:
        path: of a checkpoint with the task nlu, below the root.
    """
    unload, get = adapter_pb2.UnloadAdapterRequest, adapter_pb2.GetAdapterRequest
    bad, missing = "INVALID_ARGUMENT", "NOT_FOUND"
    return [
        InvalidAdapterCall("no name", "LoadAdapter", _load(name="", path=path), bad, "name"),
        InvalidAdapterCall("capitals in a name", "LoadAdapter", _load(name="New", path=path), bad, "name"),
        InvalidAdapterCall("a long name", "LoadAdapter", _load(name="n" * 65, path=path), bad, "name"),
        InvalidAdapterCall("a reserved name", "LoadAdapter", _load(name="base", path=path), bad, "name"),
        InvalidAdapterCall("no path", "LoadAdapter", _load(path=""), bad, "path"),
        InvalidAdapterCall("an absolute path", "LoadAdapter", _load(path="/etc"), bad, "path"),
        InvalidAdapterCall("a path out of the root", "LoadAdapter", _load(path=f"../{path}"), bad, "path"),
        InvalidAdapterCall("a path with a null character", "LoadAdapter", _load(path="a\0b"), bad, "path"),
        InvalidAdapterCall("a task twice", "LoadAdapter", _load(path=path, tasks=["nlu", "nlu"]), bad, "tasks[1]"),
        InvalidAdapterCall("an unknown task", "LoadAdapter", _load(path=path, tasks=["cooking"]), missing, "tasks"),
        InvalidAdapterCall("a name that is taken", "LoadAdapter", _load(name="trio", path=path), "ALREADY_EXISTS", ""),
        InvalidAdapterCall("nothing of that name", "UnloadAdapter", unload(name="cooking"), missing, "name"),
        InvalidAdapterCall("no adapter of that name", "GetAdapter", get(name="cooking"), missing, "name"),
    ]
