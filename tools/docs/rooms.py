"""The rooms of the packages: their order from tests/test_architecture.py, their meaning from their own docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Package → the tuple of tests/test_architecture.py that lists its rooms from the top down.
PACKAGES = {"loraf_train": "LORAF_TRAIN", "loraf_serve": "LORAF_SERVE", "loraf_serve/vllm": "VLLM"}


def rooms() -> dict[str, tuple[str, ...]]:
    """Package (a path) → its rooms from the top down."""
    test = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value
        for node in test.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {package: ast.literal_eval(constants[name]) for package, name in PACKAGES.items()}


def markdown() -> str:
    """A list for each package: room, and the first sentence of its docstring."""
    parts = []
    for package, names in rooms().items():
        parts.append(f"### {package}")
        parts.append("\n".join(_entries(ROOT / package, names)))
    return "\n\n".join(parts)


def _entries(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        is_folder = (folder / name).is_dir()
        file = folder / name / "__init__.py" if is_folder else folder / f"{name}.py"
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        summary = " ".join(text.split("\n\n")[0].split()).replace("<", "&lt;").replace("*", r"\*")
        yield f"`{name}{'/' if is_folder else '.py'}`\n:   {summary or '—'}\n"
