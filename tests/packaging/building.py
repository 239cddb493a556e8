"""Builds distributions of this repository with uv, as a release does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("loraf", "loraf_train", "loraf_serve")
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", ".so")


def uv(*arguments: object, cwd: Path, **environment: str) -> None:
    """Runs uv, from its cache if that suffices. The cache is full after `make setup`."""
    variables = os.environ | environment
    if links := variables.get("PIP_FIND_LINKS"):
        variables.setdefault("UV_FIND_LINKS", links.replace(" ", ","))
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    for options in (["--offline"], []):
        process = subprocess.run([*command, *options], cwd=cwd, env=variables, capture_output=True, text=True)
        if process.returncode == 0:
            return
    raise AssertionError(f"{' '.join(command)} exited with {process.returncode}:\n{process.stderr[-4000:]}")


def build(source: Path, target: Path, kind: str, **environment: str) -> Path:
    """Builds a distribution of the sources, an unpacked sdist or a checkout.

    Args:
        kind: `--sdist` or `--wheel`.
    """
    constraints = ROOT / "build-constraints.txt"
    uv("build", kind, "--build-constraint", constraints, "--out-dir", target, source, cwd=source, **environment)
    [file] = [file for file in target.iterdir() if file.name.startswith("loraf-")]
    return file


def copy_tracked_files(target: Path) -> Path:
    """Copies what git tracks, or would track after `git add`: a clean checkout, without the tests."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", ":!tests"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def files_below(root: Path, *folders: str) -> set[str]:
    """Paths of all files in these folders of `root`, relative to it."""
    files = (file for folder in folders for file in (root / folder).rglob("*"))
    return {file.relative_to(root).as_posix() for file in files if file.is_file()}
