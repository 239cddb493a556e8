"""The token file: what its lines mean, what is refused, and when it is read again."""

from __future__ import annotations

import functools
import logging
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf.errors import ConfigError
from loraf_serve.errors import Unauthenticated
from loraf_serve.security import tokens
from loraf_serve.security.changes import Changes
from loraf_serve.security.permissions import Permissions
from loraf_serve.security.tokens import Tokens, readable_by_others

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef+/="
TOKEN = st.text(string.ascii_letters + string.digits + "-._~+/=", min_size=16, max_size=60)


def tokens_of(folder: Path, text: str) -> Tokens:
    file = folder / "tokens"
    file.write_text(text, encoding="utf-8")
    return Tokens(file)


def test_a_line_with_a_token_alone_allows_everything_but_loading_and_priorities(tmp_path):
    found = tokens_of(tmp_path, f"# comment\n\n  {ALICE}  \n").permissions_of(f"Bearer {ALICE}")
    assert found == Permissions(client="token-3", load=False, priority=False)


def test_every_permission_can_be_written(tmp_path):
    line = f"{BOB} priority adapter=a,b tasks=math,nlu load name=bob in-flight=3 tokens-per-minute=600"
    found = tokens_of(tmp_path, f"{ALICE}\n{line}\n").permissions_of(f"bearer   {BOB}")
    names = frozenset({"a", "b"}), frozenset({"math", "nlu"})
    assert found == Permissions("bob", *names, load=True, priority=True, in_flight=3, tokens_per_minute=600)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        ALICE,
        f"Basic {ALICE}",
        "Bearer",
        "Bearer ",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE}x",
        f"Bearer {ALICE} {ALICE}",
        f"Bearer {ALICE.upper()}",
        "Bearer \udcff" + ALICE,
        "Bearer " + "x" * 100_000,
    ],
)
def test_everything_but_a_known_token_is_refused(tmp_path, authorization):
    known = tokens_of(tmp_path, ALICE)
    with pytest.raises(Unauthenticated) as error:
        known.permissions_of(authorization)
    assert ALICE not in str(error.value)


@given(st.lists(TOKEN, min_size=1, max_size=5, unique=True), TOKEN)
def test_exactly_the_tokens_of_the_file_are_known(tmp_path_factory, written, other):
    known = tokens_of(tmp_path_factory.mktemp("tokens"), "\n".join(written))
    for i, token in enumerate(written, 1):
        assert known.permissions_of(f"Bearer {token}").client == f"token-{i}"
    if other not in written:
        with pytest.raises(Unauthenticated):
            known.permissions_of(f"Bearer {other}")


def test_a_token_is_compared_with_every_entry_in_constant_time(tmp_path, monkeypatch):
    known = tokens_of(tmp_path, f"{ALICE}\n{BOB}\n")
    compared = []
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert known.permissions_of(f"Bearer {ALICE}").client == "token-1"
    assert len(compared) == 2 and all(len(a) == len(b) == 32 for a, b in compared)  # digests, whatever the length


def test_every_mistake_is_named_by_its_line_and_no_message_holds_a_token(tmp_path):
    secret = "secret-0123456789abcdef"
    lines = [
        f"{secret} tasks=UPPER",
        "short",
        f"{secret} wrong=1",
        f"{secret} load=yes",
        f"{secret} in-flight=0",
        f"{secret} load load",
        f"{secret}é",
        f"{ALICE} name=x",
        f"{ALICE}",
        f"{BOB} name=x",
        f"{secret} {BOB}",
    ]
    with pytest.raises(ConfigError) as error:
        tokens_of(tmp_path, "\n".join(lines))
    assert [p.field for p in error.value.problems] == [f"line {i}" for i in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11)]
    assert not any(token in str(error.value) for token in (secret, ALICE, BOB))


def test_a_file_without_tokens_or_that_cannot_be_read_is_refused(tmp_path):
    for text in ("", "# only a comment\n"):
        with pytest.raises(ConfigError, match="has no token"):
            tokens_of(tmp_path, text)
    (tmp_path / "tokens").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(ConfigError, match="not UTF-8"):
        Tokens(tmp_path / "tokens")
    with pytest.raises(ConfigError, match="No such file"):
        Tokens(tmp_path / "nowhere")


def test_a_pipe_in_the_files_place_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokens")
    with pytest.raises(ConfigError, match="is not a regular file"):
        Tokens(tmp_path / "tokens")


def test_a_byte_order_mark_is_no_part_of_the_token(tmp_path):
    assert tokens_of(tmp_path, "\ufeff" + ALICE).permissions_of(f"Bearer {ALICE}")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tokens, "Changes", functools.partial(Changes, seconds=0.0))
    known = tokens_of(tmp_path, ALICE)
    new = tmp_path / "new"
    new.write_text(BOB)
    os.replace(new, tmp_path / "tokens")  # as Kubernetes replaces a secret
    assert known.permissions_of(f"Bearer {BOB}")
    with pytest.raises(Unauthenticated):
        known.permissions_of(f"Bearer {ALICE}")
    (tmp_path / "tokens").write_text("broken")
    with caplog.at_level(logging.ERROR):
        assert known.permissions_of(f"Bearer {BOB}")
    assert "the tokens stay as they were" in caplog.text and BOB not in caplog.text
    (tmp_path / "tokens").unlink()
    assert known.permissions_of(f"Bearer {BOB}")


def test_a_file_that_others_can_read_is_noticed(tmp_path):
    tokens_of(tmp_path, ALICE)
    os.chmod(tmp_path / "tokens", 0o640)
    assert not readable_by_others(tmp_path / "tokens")
    os.chmod(tmp_path / "tokens", 0o644)
    assert readable_by_others(tmp_path / "tokens")
