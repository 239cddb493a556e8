"""Reading the packages' own source for the tests of architecture and style: files, module names, imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("loraf", "loraf_train", "loraf_serve")
GENERATED = "_pb2"  # protoc's stubs


def sources(*folders: str) -> list[Path]:
    """Every Python file below these folders of the repository, generated ones left out."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if GENERATED not in file.name]
    assert files, folders
    return files


def path_of(file: Path) -> str:
    """A file's path as messages and test ids show it."""
    return file.relative_to(ROOT).as_posix()


def module_name(file: Path) -> str:
    """`loraf_train/data/values.py` → `loraf_train.data.values`; a folder's `__init__.py` is the folder's own name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def syntax_tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(file: Path, node: ast.AST | None = None, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether inside a function or under TYPE_CHECKING) for every import of a file.

    `from package import name` gives `package.name`, so that a submodule named that way is seen too. Relative imports
    are made absolute.
    """
    for child in ast.iter_child_nodes(syntax_tree(file) if node is None else node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = file.relative_to(ROOT).parent.parts
                base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
            yield from ((f"{base}.{alias.name}", lazy) for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
            argument = child.args[0] if child.args else None
            place = f"{path_of(file)}:{child.lineno}"
            assert isinstance(argument, ast.Constant), f"{place}: an import of a computed name"
            yield argument.value, lazy
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        yield from imports(file, child, lazy or inside)


def import_graph(*packages: str) -> dict[str, set[str]]:
    """Module → modules of these packages that it imports anywhere: at import time, in a function, or for types only.

    A package's `__init__` counts where it is imported by its own name or for a name that it defines, not where only a
    module below it is.
    """
    modules = {module_name(file): file for file in sources(*packages)}
    return {
        name: {known for imported, _ in imports(file) if (known := _known(imported, modules)) and known != name}
        for name, file in modules.items()
    }


def _known(imported: str, modules: dict[str, Path]) -> str | None:
    """The module that an import names, itself or by something in it."""
    return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules), None)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in sorted(graph.get(node, ())):
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return groups
