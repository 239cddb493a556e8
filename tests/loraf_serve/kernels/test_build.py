"""setup.py builds the C++ libraries, with compilers that are missing, fail, or lack flags."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIBRARIES = ("loraf/matrices/_native.so", "loraf_serve/kernels/_cpu.so")

# Logs its arguments and writes the output file. Fails on flags and files that LACKS names.
COMPILER = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
lacks = os.environ.get("LACKS", "").split()
if set(lacks) & set(arguments) or any(a.endswith(lack) for a in arguments for lack in lacks):
    sys.exit("cc: note: in something\\ncc: error: unrecognised: " + " ".join(lacks))
Path(arguments[arguments.index("-o") + 1]).write_text("built")
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the files that a build of the libraries reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("loraf/matrices/csrc", "loraf_serve/kernels/csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in (
        "loraf/__init__.py",
        "loraf/matrices/__init__.py",
        "loraf_serve/__init__.py",
        "loraf_serve/kernels/__init__.py",
    ):
        (tmp_path / name).touch()
    (tmp_path / "loraf" / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(tmp_path / "log")), encoding="utf-8")
    compiler.chmod(0o755)
    return tmp_path


def build(tree: Path, **environment: str) -> tuple[set[str], list[str], list[list[str]]]:
    """Returns the libraries that exist afterwards, the warnings, and the arguments of each compiler call."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"CXX": str(tree / "compiler")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    log = tree / "log"
    calls = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    warnings = [line for line in run.stderr.splitlines() if line.startswith("loraf: WARNING")]
    return {name for name in LIBRARIES if (tree / name).exists()}, warnings, calls


def test_each_file_is_compiled_and_delta_for_each_instruction_set(tree):
    built, warnings, calls = build(tree)
    assert (built, warnings) == (set(LIBRARIES), [])
    compiled = [call for call in calls if "-c" in call]
    sources = sorted(Path(call[call.index("-c") + 1]).name for call in compiled)
    every = [
        file.name
        for folder in ("loraf/matrices", "loraf_serve/kernels")
        for file in (ROOT / folder / "csrc").glob("*.cpp")
    ]
    variants = [a for call in compiled for a in call if a.startswith("-DLORAF_VARIANT=")]
    assert sources == sorted(every + ["delta.cpp"] * (len(variants) - 1))
    assert "-DLORAF_VARIANT=plain" in variants
    if os.uname().machine == "x86_64":
        assert {name.partition("=")[2] for name in variants} == {"plain", "avx2", "avx512", "avx512bf16"}
        [bf16] = [call for call in compiled if "-DLORAF_VARIANT=avx512bf16" in call]
        assert "-mavx512bf16" in bf16
    [plain] = [call for call in compiled if "-DLORAF_VARIANT=plain" in call]
    assert not [flag for flag in plain if flag.startswith("-m")]
    assert "-fopenmp" in plain


def test_flags_that_the_compiler_rejects_are_left_out(tree):
    built, warnings, calls = build(tree, LACKS="-mavx512bf16 -fopenmp")
    assert (built, warnings) == (set(LIBRARIES), [])
    compiled = [call for call in calls if "-c" in call]
    assert not [call for call in compiled if "-fopenmp" in call or "-DLORAF_VARIANT=avx512bf16" in call]
    [library] = [call for call in compiled if call[call.index("-c") + 1].endswith("library.cpp")]
    assert "-DLORAF_WITH_plain" in library and "-DLORAF_WITH_avx512bf16" not in library


def test_without_a_compiler_there_is_one_line_and_no_library(tree):
    built, warnings, _ = build(tree, CXX="no-such-compiler")
    assert built == set()
    assert len(warnings) == 2
    assert "loraf_serve.kernels._cpu was not compiled" in warnings[1] and "no-such-compiler" in warnings[1]


def test_a_failed_compilation_gives_the_reason_and_removes_the_old_library(tree):
    build(tree)
    built, warnings, _ = build(tree, LACKS="pack.cpp")
    assert built == {"loraf/matrices/_native.so"}
    [warning] = warnings
    assert "loraf_serve.kernels._cpu" in warning and "cc: error: unrecognised: pack.cpp" in warning


def test_a_folder_without_sources_builds_no_library(tree):
    shutil.rmtree(tree / "loraf/matrices/csrc")
    built, warnings, _ = build(tree)
    assert (built, warnings) == ({"loraf_serve/kernels/_cpu.so"}, [])
