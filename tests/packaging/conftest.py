"""The distributions that the tests of packaging look at, each built once."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.packaging.building import build, copy_tracked_files


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A clean checkout."""
    return copy_tracked_files(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def unpacked(checkout, tmp_path_factory) -> Path:
    """The source distribution of the clean checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build(checkout, folder / "dist", "--sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(unpacked, tmp_path_factory) -> Path:
    """The wheel built from the source distribution."""
    return build(unpacked, tmp_path_factory.mktemp("wheel"), "--wheel")
