"""The generated gRPC stubs run with every grpcio and protobuf that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.packaging.building import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = [ROOT / "loraf_serve" / package for package in ("v1", "vllm_proto")]
STUBS = [file for folder in FOLDERS for file in sorted(folder.glob("*_pb2*.py"))]
SERVICES = [file for file in STUBS if file.stem.endswith("_grpc")]
MESSAGES = [file for file in STUBS if file not in SERVICES]

Version = tuple[int, ...]


def version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def lower_bound(package: str) -> Version:
    """The oldest version of a dependency that pyproject.toml allows."""
    [bound] = [
        match[1]
        for requirement in PROJECT["project"]["dependencies"]
        if (match := re.fullmatch(rf"{package}>=([\d.]+).*", requirement))
    ]
    return version(bound)


@pytest.mark.parametrize("file", SERVICES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_services_accept_the_oldest_grpcio(file: Path):
    [generated] = re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", file.read_text(encoding="utf-8"))
    assert version(generated)[:2] <= lower_bound("grpcio")
    assert version(generated)[2] == 0


@pytest.mark.parametrize("file", MESSAGES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_messages_accept_the_oldest_protobuf(file: Path):
    pattern = r"ValidateProtobufRuntimeVersion\(\s*\S+,\s*(\d+),\s*(\d+),\s*(\d+),"
    [generated] = re.findall(pattern, file.read_text(encoding="utf-8"))
    oldest = lower_bound("protobuf")
    assert tuple(map(int, generated))[: len(oldest)] <= oldest


def test_messages_accept_the_newest_protobuf():
    """Protobuf promises that generated code runs with the next major version, not with the one after it."""
    [generated] = {
        int(major)
        for file in MESSAGES
        for major in re.findall(r"Protobuf Python Version: (\d+)\.", file.read_text(encoding="utf-8"))
    }
    [excluded] = re.findall(r"protobuf>=[\d.]+,<(\d+)", "\n".join(PROJECT["project"]["dependencies"]))
    assert int(excluded) == generated + 2


def test_grpc_packages_share_one_lower_bound_with_the_tools():
    packages = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status")
    [bound] = {lower_bound(package) for package in packages}
    oldest = ".".join(map(str, bound))
    assert f"grpcio-tools=={oldest}.*" in PROJECT["build-system"]["requires"]
    assert f"grpcio-tools=={oldest}.0\n" in (ROOT / "build-constraints.txt").read_text(encoding="utf-8")
