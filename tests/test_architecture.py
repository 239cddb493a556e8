"""The shape of the code, read from its syntax: imports go one way, dangerous calls are absent, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("loraf", "loraf_train", "loraf_serve")
GENERATED = "_pb2"  # protoc's stubs
LONGEST = 450

LORAF_MAY_IMPORT = {"torch", "numpy", "safetensors", "loraf"} | sys.stdlib_module_names
LORAF_MAY_IMPORT_LAZILY = {"huggingface_hub"}


def sources(*folders: str) -> list[Path]:
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if GENERATED not in file.name]
    assert found
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(file: Path, node: ast.AST | None = None, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether inside a function or under TYPE_CHECKING) for every import of a file.

    `from package import name` gives `package.name`, so that a submodule named that way is seen too. Relative imports
    are made absolute.
    """
    for child in ast.iter_child_nodes(tree(file) if node is None else node):
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
            assert isinstance(argument, ast.Constant), f"{name_of(file)}:{child.lineno}: an import of a computed name"
            yield argument.value, lazy
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        yield from imports(file, child, lazy or inside)


def top(module: str) -> str:
    return module.split(".")[0]


# --- imports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sources("loraf"), ids=name_of)
def test_the_foundation_imports_next_to_nothing(file):
    for module, lazy in imports(file):
        allowed = LORAF_MAY_IMPORT | (LORAF_MAY_IMPORT_LAZILY if lazy else set())
        assert top(module) in allowed, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize(("package", "other"), [("loraf_train", "loraf_serve"), ("loraf_serve", "loraf_train")])
def test_training_and_serving_do_not_know_each_other(package, other):
    for file in sources(package):
        assert other not in {top(module) for module, _ in imports(file)}, name_of(file)


def test_vllm_is_known_in_one_place():
    users = {file for file in sources(*PACKAGES) for module, _ in imports(file) if top(module) == "vllm"}
    home = ROOT / "loraf_serve" / "vllm"
    assert [name_of(file) for file in users if not file.is_relative_to(home)] == []


def test_the_package_does_not_import_its_tests_or_tools():
    for file in sources(*PACKAGES):
        assert not {"tests", "tools", "pytest", "hypothesis", "peft"} & {
            top(module) for module, lazy in imports(file) if not lazy
        }


def test_imports_of_loraf_form_no_circle():
    """Among loraf's own modules, at import time."""
    modules = {f"loraf.{file.stem}": file for file in sources("loraf")}
    needs = {
        name: {
            needed
            for module, lazy in imports(file)
            if not lazy
            for needed in (module, module.rpartition(".")[0])
            if needed in modules
        }
        for name, file in modules.items()
    }
    done: set[str] = set()
    while len(done) < len(modules):
        ready = {name for name, needed in needs.items() if name not in done and needed <= done}
        assert ready, f"a circle among {sorted(modules.keys() - done)}"
        done |= ready


def test_the_light_modules_load_nothing_heavy():
    """Reading a manifest must not cost the seconds that torch takes to import."""
    code = (
        "import sys, loraf, loraf.errors, loraf.tasksets, loraf.strict_json, loraf.manifest\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


# --- what is not done -------------------------------------------------------------------------------------------


def dangers(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every construct that this project does without."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            modules = [child.module or ""] if isinstance(child, ast.ImportFrom) else [a.name for a in child.names]
            names = {alias.name for alias in child.names}
            for module in modules:
                if top(module) in {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}:
                    yield child.lineno, f"import of {module}"
                if module == "torch" and "load" in names or module == "yaml" and names & {"load", "unsafe_load"}:
                    yield child.lineno, f"import of {module}.load"
        if isinstance(child, ast.Attribute):
            written = ast.unparse(child)
            if written in {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}:
                yield child.lineno, written
        if isinstance(child, ast.Call):
            if isinstance(child.func, ast.Name) and child.func.id in {"eval", "exec"}:
                yield child.lineno, child.func.id
            for keyword in child.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in {"trust_remote_code", "shell", "allow_pickle"} and not off:
                    yield child.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg == "weights_only" and off:
                    yield child.lineno, "weights_only=False"
        if isinstance(child, ast.ExceptHandler):
            broad = child.type is None or ast.unparse(child.type) in {"Exception", "BaseException"}
            if broad and all(isinstance(statement, ast.Pass) for statement in child.body):
                yield child.lineno, "an exception swallowed"


@pytest.mark.parametrize("file", [*sources(*PACKAGES, "tools"), ROOT / "setup.py"], ids=name_of)
def test_nothing_dangerous(file):
    found = [f"{name_of(file)}:{line}: {what}" for line, what in dangers(tree(file))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "load = torch.load",
        "yaml.load(text)",
        "from yaml import load",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "subprocess.run(text, shell=True)",
        "os.system('ls')",
        "np.load(x, allow_pickle=True)",
        "f(weights_only=False)",
        "eval(text)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "yaml.safe_load(text)",
        "model.eval()",
        "safetensors.torch.load(data)",
        "f(trust_remote_code=False, shell=False, weights_only=True)",
        "try:\n    f()\nexcept OSError:\n    pass",
    ],
)
def test_the_search_leaves_the_rest_alone(code):
    assert not list(dangers(ast.parse(code)))


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*sources(*PACKAGES, "tools", "tests"), ROOT / "setup.py"], ids=name_of)
def test_no_file_is_too_long(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{name_of(file)} has {lines} lines: let it do one thing"


def test_every_file_says_what_it_is_for():
    """A docstring opens each module of the packages."""
    assert [name_of(file) for file in sources(*PACKAGES) if not ast.get_docstring(tree(file))] == []
