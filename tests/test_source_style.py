"""Style of the source, read from its syntax: no dangerous calls, no repetition, short files, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGES, ROOT, path_of, sources, syntax_tree

LONGEST = 450  # lines of a file
IGNORED_STARTS = ("# ", "import ", "from ")
REPEATED = 10  # equal lines in a row that may not stand twice


def top(module: str) -> str:
    return module.split(".")[0]


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


@pytest.mark.parametrize("file", [*sources(*PACKAGES, "tools"), ROOT / "setup.py"], ids=path_of)
def test_nothing_dangerous(file):
    assert [f"{path_of(file)}:{line}: {what}" for line, what in dangers(syntax_tree(file))] == []


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


@pytest.mark.parametrize("file", [*sources(*PACKAGES, "tools", "tests"), ROOT / "setup.py"], ids=path_of)
def test_no_file_is_too_long(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{path_of(file)} has {lines} lines: let it do one thing"


def test_every_file_says_what_it_is_for():
    """A docstring opens each module of the packages."""
    assert [path_of(file) for file in sources(*PACKAGES) if not ast.get_docstring(syntax_tree(file))] == []


# --- repetition -------------------------------------------------------------------------------------------------


def significant_lines(text: str) -> list[tuple[int, str]]:
    """(line number, line without white space around it) of lines that say something.

    Blank lines, comments, lone brackets and imports say nothing of the kind.
    """
    return [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if len(line.strip()) > 3 and ("# repeated: " in line or not line.strip().startswith(IGNORED_STARTS))
    ]


def repetitions(texts: dict[str, str], length: int) -> list[str]:
    """Places where `length` significant lines in a row stand for the second time."""
    first: dict[tuple[str, ...], str] = {}
    again = []
    for name, text in texts.items():
        lines = significant_lines(text)
        last = -length
        for start in range(len(lines) - length + 1):
            block = tuple(line for _, line in lines[start : start + length])
            place = f"{name}:{lines[start][0]}"
            if block not in first:
                first[block] = place
            elif start >= last + length:
                again.append(f"{place} repeats {first[block]}")
                last = start
    return again


def test_no_block_of_code_stands_twice():
    """A block that has to stand twice says why in a comment `repeated: …` among its lines, which tells them apart."""
    texts = {path_of(file): file.read_text(encoding="utf-8") for file in sources(*PACKAGES)}
    assert repetitions(texts, REPEATED) == []


def test_a_block_that_stands_twice_would_be_found():
    block = "\n".join(f"value_{i} = {i}" for i in range(REPEATED))
    assert repetitions({"a": block, "b": f"x = 1\n\n{block}"}, REPEATED) == ["b:3 repeats a:1"]
    assert repetitions({"a": block, "b": block.replace("value_4", "other")}, REPEATED) == []
