"""JSON files that state their format and carry a digest of their content, so that damage is detected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from loraf.files import strict_json


def seal(kind: str, version: int, content: Mapping[str, Any]) -> bytes:
    """Encodes an object as the bytes of a file.

    Args:
        kind: the field `format`.
        version: the field `format_version`.
        content: anything that `strict_json.plain` accepts, without the fields `format`, `format_version`, `digest`.
    """
    plain = strict_json.plain({"format": kind, "format_version": version, **content})
    return strict_json.dumps(plain | {"digest": content_digest(plain)}, indent=1) + b"\n"


def unseal(data: bytes, kind: str, version: int) -> tuple[dict[str, Any], str]:
    """Decodes the bytes of a file that `seal` wrote.

    Returns:
        The content as plain JSON, and its digest.

    Raises:
        ValueError: the file is damaged, or has another format or version.
    """
    content = strict_json.loads(data)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"its format is not {kind!r}")
    digest = content.pop("digest", None)
    if digest != content_digest(content):
        raise ValueError("it does not match its digest")
    if content.pop("format_version", None) != version:
        raise ValueError("another release of loraf wrote it")
    del content["format"]
    return content, digest


def content_digest(content: Any) -> str:
    """Returns the SHA-256 (hex) of plain JSON, independent of its keys' order."""
    return hashlib.sha256(strict_json.dumps(content, sort_keys=True)).hexdigest()
