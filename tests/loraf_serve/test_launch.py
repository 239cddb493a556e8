"""`launch`: the client that comes with the server. `test_cli.py` starts a real one."""

from __future__ import annotations

import os
import sys

import pytest

from loraf_serve.launch import launch
from tests.loraf_serve.client.stand_in import standing_in
from tests.loraf_serve.harness import eventually

TOKEN = "token-of-a-notebook"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A program that says where it listens, as loraf-serve does, and writes its process id to a file."""
    program, pid = tmp_path / "program", tmp_path / "pid"
    with standing_in() as (stand_in, address):
        program.write_text(f'#!/bin/sh\necho $$ > "{pid}"\necho "listening on {address}"\nexec sleep 60\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        yield stand_in, pid


def test_the_client_takes_further_arguments(server):
    stand_in, _ = server
    with launch("tiny", client={"token": TOKEN, "retries": 0}) as running:
        running.client.adapters()
        assert stand_in.attempts[-1].metadata["authorization"] == f"Bearer {TOKEN}"


def test_a_client_that_cannot_be_made_leaves_no_server_behind(server):
    _, pid = server
    with pytest.raises(ValueError, match="retries=9"):
        launch("tiny", client={"retries": 9})

    def is_gone() -> bool:
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return True
        return False

    assert eventually(is_gone)
