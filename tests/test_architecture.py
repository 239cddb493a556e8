"""Folders are the architecture: which room may import which, and what each room says of itself.

Every import counts, also inside functions and for types only. CONTRIBUTING.md says where a change belongs.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    circles,
    import_graph,
    imports,
    path_of,
    sources,
    syntax_tree,
)

# Rooms of a package from the top down: a room imports rooms below it only. A single file directly in the package is a
# room as well.
LORAF_TRAIN = (
    "cli",
    "dispatch",
    "commands",
    "compare",
    "peft",
    "sequence",
    "card",
    "terminal",
    "scoring",
    "retention",
    "trainer",
    "importing",
    "data",
    "settings",
    "adapter",
    "metrics",  # the public name of grading.builtin
    "grading",
    "processes",
    "set_options",
)
LORAF_SERVE = (
    "cli",
    "launch",
    "client_cli",
    "client_options",
    "chat",
    "client",
    "check",
    "http",
    "service",
    "request",
    "choose_backend",
    "vllm",
    "adapters",
    "backends",
    "kernels",
    "observe",
    "security",
    "addresses",
    "errors",
    "limits",
    "page",
    "v1",
    "vllm_proto",
)
VLLM = ("plugin", "http", "engine", "stock", "slots", "resident", "worker", "forms", "relied_on", "naming")
# Side by side: neither may import the other.
STRANGERS = (
    ("loraf_train", "loraf_serve"),
    ("loraf_train.trainer", "loraf_train.scoring"),
    ("loraf_serve.vllm.engine", "loraf_serve.vllm.stock"),
    ("loraf_serve.vllm.engine", "loraf_serve.vllm.plugin"),
    ("loraf_serve.vllm.slots", "loraf_serve.vllm.resident"),
)
SETTINGS_KNOW_NOTHING_OF = ("data", "trainer", "sequence", "scoring", "adapter", "commands", "compare", "terminal")
MAY_PRINT = ("loraf_train/commands", "loraf_train/compare", "loraf_train/terminal", "loraf_train/cli.py")

LORAF_MAY_IMPORT = {"torch", "numpy", "safetensors", "loraf"} | sys.stdlib_module_names
LORAF_MAY_IMPORT_LAZILY = {"huggingface_hub", "regex"}


def top(module: str) -> str:
    return module.split(".")[0]


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


# --- circles and directions -------------------------------------------------------------------------------------


def test_no_circle_of_imports_anywhere():
    assert circles(import_graph(*PACKAGES)) == []


def test_no_circle_of_imports_between_folders():
    """Folders of a package, each with its own files only; the three files in loraf_serve/vllm count one by one."""
    graph: dict[str, set[str]] = {}

    def folder(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[: 3 if parts[:2] == ["loraf_serve", "vllm"] else 2])

    for module, needed in import_graph("loraf_train", "loraf_serve").items():
        graph.setdefault(folder(module), set()).update(folder(name) for name in needed)
    assert circles(graph) == []


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("package", "rooms"), [("loraf_train", LORAF_TRAIN), ("loraf_serve", LORAF_SERVE), ("loraf_serve.vllm", VLLM)]
)
def test_rooms_import_only_rooms_below_them(package, rooms):
    def room(module: str) -> str | None:
        rest = module.removeprefix(f"{package}.") if is_in(module, package) and module != package else ""
        return rest.split(".")[0] or None

    wrong = []
    for module, needed in import_graph(*PACKAGES).items():
        here = room(module)
        if here is None:
            continue
        assert here in rooms, f"{module}: tell this test where the room {here} stands"
        for there in filter(None, map(room, needed)):
            if rooms.index(there) < rooms.index(here):
                wrong.append(f"{module} imports {package}.{there}, which stands above it")
    assert wrong == []


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_rooms_side_by_side_do_not_know_each_other(one, other):
    graph = import_graph(*PACKAGES)
    for here, there in ((one, other), (other, one)):
        assert [
            (module, name)
            for module, needed in graph.items()
            if is_in(module, here)
            for name in needed
            if is_in(name, there)
        ] == []


def test_settings_know_no_data():
    for module, needed in import_graph("loraf_train").items():
        if is_in(module, "loraf_train.settings"):
            for room in SETTINGS_KNOW_NOTHING_OF:
                assert not [name for name in needed if is_in(name, f"loraf_train.{room}")], module


@pytest.mark.parametrize("file", sources("loraf"), ids=path_of)
def test_loraf_imports_next_to_nothing(file):
    for module, lazy in imports(file):
        allowed = LORAF_MAY_IMPORT | (LORAF_MAY_IMPORT_LAZILY if lazy else set())
        assert top(module) in allowed, f"{path_of(file)} imports {module}"


def test_only_one_folder_imports_vllm():
    users = {file for file in sources(*PACKAGES) for module, _ in imports(file) if top(module) == "vllm"}
    home = ROOT / "loraf_serve" / "vllm"
    assert [path_of(file) for file in users if not file.is_relative_to(home)] == []


def test_the_packages_do_not_import_tests_or_tools():
    for file in sources(*PACKAGES):
        imported = {top(module) for module, lazy in imports(file) if not lazy}
        assert not {"tests", "tools", "pytest", "hypothesis"} & imported
        assert "peft" not in imported or file.is_relative_to(ROOT / "loraf_train" / "peft"), path_of(file)


def test_light_modules_load_nothing_heavy():
    """Reading a manifest must not cost the seconds that torch takes to import."""
    code = (
        "import sys, loraf, loraf.errors, loraf.tasksets, loraf.files.strict_json, loraf.manifest\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


# --- what rooms say and do --------------------------------------------------------------------------------------


def test_every_folder_says_what_it_is():
    """`__init__.py` opens with a docstring of some lines: what this room is, what may enter it."""
    for package in PACKAGES:
        folders = {file.parent for file in sources(package)}
        for folder in sorted(folders):
            init = folder / "__init__.py"
            assert init.is_file(), f"{path_of(folder)} has no __init__.py"
            text = ast.get_docstring(syntax_tree(init)) or ""
            assert len(text.splitlines()) >= 3, f"{path_of(init)} does not say what the folder is and what may enter it"


def test_only_some_rooms_of_training_print():
    printing = [
        f"{path_of(file)}:{call.lineno}"
        for file in sources("loraf", "loraf_train")
        if not path_of(file).startswith(MAY_PRINT)
        for call in ast.walk(syntax_tree(file))
        if isinstance(call, ast.Call)
        and (
            (isinstance(call.func, ast.Name) and call.func.id == "print")
            or (isinstance(call.func, ast.Attribute) and call.func.attr == "print")
        )
    ]
    assert printing == []
