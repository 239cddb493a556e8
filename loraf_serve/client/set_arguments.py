"""A task set as people write it, as arguments of `request_of`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraf.set_text import AS_TRAINED, SetText
from loraf_serve.v1 import adapter_pb2


def set_arguments(written: SetText, adapter: adapter_pb2.Adapter | None) -> dict[str, Any]:
    """Returns the arguments that select a set.

    Args:
        adapter: tells whether a name is one of a named set; None: it is one of a task.
    """
    if written.kind in ("all", "base"):
        return {"base": written.kind == "base"}
    if written.kind == AS_TRAINED:
        return {"as_trained": written.name}
    if written.name and adapter and any(named.name == written.name for named in adapter.sets):
        return {"named": written.name}
    return {"tasks": dict(written.pairs)}


def adapter_named(name: str, adapters: Iterable[adapter_pb2.Adapter]) -> adapter_pb2.Adapter | None:
    """Returns the adapter that a request means by this name, "" being the only one; None if there is none."""
    return next((adapter for adapter in adapters if name in (adapter.name, "")), None)
