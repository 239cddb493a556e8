"""What the source distribution and the wheel contain, and what the wheel's tag requires."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.loraf_serve.kernel_cases import COMPILER
from tests.packaging.building import GENERATED, PACKAGES, build, files_below
from tests.tools import needs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

LIBRARIES = {"loraf/matrices/_native.so", "loraf_serve/kernels/_cpu.so"}
STUBS = {
    f"loraf_serve/{name}_pb2{end}"
    for name in ("v1/adapter", "v1/generation", "v1/info", "vllm_proto/control", "vllm_proto/inference")
    for end in (".py", ".pyi", "_grpc.py")
}


def names(wheel: Path) -> set[str]:
    """The wheel's files, but for its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path, file: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(f".dist-info/{file}")]
        return archive.read(name).decode().splitlines()


def test_the_sdist_has_everything_that_the_build_reads(checkout, unpacked):
    files = {"LICENSE", "README.md", "CHANGELOG.md", "build-constraints.txt", "pyproject.toml", "setup.py"}
    assert files | files_below(checkout, *PACKAGES, "proto") <= files_below(unpacked, ".")


def test_the_sdist_has_no_generated_files_and_no_tests(unpacked):
    files = files_below(unpacked, ".")
    assert not [file for file in files if file.endswith(GENERATED) or file.startswith("tests/")]


def test_the_wheel_has_every_file_of_the_packages_and_the_generated_ones(checkout, wheel):
    if COMPILER is None:
        pytest.skip(needs("C++ compiler"))
    files = {file for file in files_below(checkout, *PACKAGES) if "/csrc/" not in file}
    assert {f"{package}/py.typed" for package in PACKAGES} < files
    assert names(wheel) == files | STUBS | LIBRARIES


def test_the_wheel_has_the_license_and_the_commands(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert "loraf-train = loraf_train.cli:main" in metadata(wheel, "entry_points.txt")


def test_a_wheel_with_libraries_is_for_any_python_3_on_this_platform(wheel):
    if COMPILER is None:
        pytest.skip(needs("C++ compiler"))
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.stem.split("-")[4].startswith("linux_")
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")


def test_a_wheel_without_libraries_is_for_any_platform(unpacked, tmp_path):
    wheel = build(unpacked, tmp_path, "--wheel", CXX="no-such-compiler")
    assert wheel.stem.split("-")[2:] == ["py3", "none", "any"]
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    assert not LIBRARIES & names(wheel) and names(wheel) >= STUBS
