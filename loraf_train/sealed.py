"""JSON objects on disk that say what they are and carry a digest of all of it: half a file, or another, is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from loraf import strict_json


def seal(kind: str, version: int, content: Mapping[str, Any]) -> bytes:
    """The file of an object.

    Args:
        kind: goes into `format`; version: into `format_version`.
        content: anything that `strict_json.plain` takes, without those two fields and `digest`.
    """
    plain = strict_json.plain({"format": kind, "format_version": version, **content})
    return strict_json.dumps(plain | {"digest": _digest(plain)}, indent=1) + b"\n"


def unseal(data: bytes, kind: str, version: int) -> tuple[dict[str, Any], str]:
    """What `seal` was given, as plain JSON, and the digest. Raises ValueError: it is something else, or damaged."""
    content = strict_json.loads(data)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"its format is not {kind!r}")
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise ValueError("it does not match its digest")
    if content.pop("format_version", None) != version:
        raise ValueError("another release of loraf wrote it")
    del content["format"]
    return content, digest


def _digest(content: Any) -> str:
    return hashlib.sha256(strict_json.dumps(content, sort_keys=True)).hexdigest()
