"""Tools that some tests need and not every machine has. Tests without theirs are skipped, and the summary says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PREFIX = "needs "

# Tool → where it comes from.
TOOLS = {
    "axe-core": "make tools, with npm",
    "buf": "make tools, with Node.js and npm",
    "C++ compiler": "Debian's g++, then make setup",
    "Chromium": "Debian's chromium",
    "GPU": "an NVIDIA GPU and make setup EXTRAS=cuda,dev",
    "Go templates": "make tools, with Node.js and npm",
    "MkDocs": "make setup",
    "Triton": "comes with vLLM: make setup",
    "curl": "Debian's curl",
    "grpc-js": "make tools, with Node.js and npm",
    "lm-eval": "make tools",
    "openssl": "Debian's openssl",
    "promtool": "Debian's prometheus",
    "real records": "examples/mistral-7b/get_data.py FOLDER, then LORAF_TEST_DATA=FOLDER",
    "vLLM's proto files": "rust/proto of vLLM 0.32, as in its source distribution, then LORAF_VLLM_PROTO=FOLDER",
    "vLLM": "make setup EXTRAS=cpu,dev",
}


def needs(tool: str) -> str:
    """The reason to skip a test that lacks this tool."""
    return f"{PREFIX}{tool} ({TOOLS[tool]})"


def missing_tools(reasons: Iterable[str]) -> list[str]:
    """One line for each tool that these reasons of skipped tests or test files name, with their number."""
    counts = Counter(reason for reason in reasons if reason.startswith(PREFIX))
    return [f"{reason}: {count} skipped" for reason, count in sorted(counts.items())]
