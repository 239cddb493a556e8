"""Certificates for tests of TLS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools import needs


def make_certificate(folder: Path, name: str, *more: str) -> None:
    """Writes `name`.key and `name`.crt."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip(needs("openssl"))
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}", "-days", "1", *more]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def make_pki(folder: Path) -> Path:
    """An authority `ca`, another one `other`, and certificates of `ca` for a `server` on 127.0.0.1 and a `client`."""
    make_certificate(folder, "ca")
    make_certificate(folder, "other")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    make_certificate(folder, "server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    make_certificate(folder, "client", *signed)
    return folder
