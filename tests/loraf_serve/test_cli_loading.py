"""`--adapter-root` and `--adapter-memory`: what is refused at start, and the whole way once with the merged backend."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf_serve import choose_backend, cli, client_cli
from loraf_serve.adapters.memory import parse_size, size_text
from loraf_serve.client import ServiceError
from loraf_serve.launch import launch
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, model_folder


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("123456", 123456),
        ("10B", 10),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        (" 2GiB ", 2 << 30),
        ("0.5TiB", 1 << 39),
        ("1e3", 1000),
    ],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "2GB", "2G", "-1", "0", "0.5", "nan", "inf", "1e400", "x", "1 2", "2 KiB B"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_size_is_written_as_it_is_read(size):
    # To four digits, then down to whole bytes.
    assert abs(parse_size(size_text(size)) - size) <= 5e-4 * size + 1
    assert len(size_text(size)) <= 9


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["--model", str(model_folder()), "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_root_that_is_no_folder_is_named_with_the_other_mistakes(capsys, tmp_path):
    text = refused(capsys, "--adapter-root", str(tmp_path / "nowhere"), "--grace", "-1", "--adapter", "./none")
    assert f"{tmp_path / 'nowhere'}: --adapter-root: is no folder → name the folder" in text
    assert "--grace" in text and "./none" in text


def test_a_size_that_is_none_ends_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--model", "tiny", "--adapter-memory", "2GB"])
    assert error.value.code == 2
    assert "'2GB' is no size; write a number of bytes, or 500MiB, or 2GiB" in capsys.readouterr().err


def test_adapters_that_do_not_fit_at_start_are_the_users_to_mend(capsys, monkeypatch):
    monkeypatch.setattr(choose_backend, "choose", lambda *a: choose_backend.Chosen(FakeBackend(), "a test"))
    text = refused(capsys, "--adapter", str(checkpoint_folder()), "--adapter-memory", "10KiB")
    assert "--adapter-memory: this adapter takes 42 KiB, and of 10 KiB for all of them 0 B are taken →" in text


def test_the_whole_way_with_the_merged_backend(capsys):
    """A server without adapters; one is loaded, answers, is replaced, answers otherwise, and is unloaded."""
    for seed in (0, 1):
        checkpoint_folder(seed)
    options = ("--backend", "merged", "--dtype", "float32", "--adapter-root", str(checkpoints_root()))
    with launch(str(model_folder()), options=(*options, "--adapter-memory", "1GiB"), start_timeout=300) as server:

        def run(*arguments: str) -> tuple[int, str, str]:
            return client_cli.main([*arguments, "--server", server.address]), *capsys.readouterr()

        def answer(**selection) -> tuple[int, ...]:
            return server.client.generate("Hello", temperature=0, max_tokens=12, ignore_eos=True, **selection).token_ids

        base = answer(base=True)
        assert run("adapters") == (0, "", "")
        assert run("load", "prod", "ckpt0")[0] == 0
        first = answer()
        status, _, err = run("load", "prod", "ckpt1")
        assert status == 2 and "ALREADY_EXISTS" in err and "replace" in err
        assert run("load", "prod", "ckpt1", "--replace")[0] == 0
        assert len({base, first, answer()}) == 3
        assert run("load", "prod", "ckpt0", "--replace")[0] == 0
        assert answer() == first
        (adapter,) = server.client.adapters()
        process_and_a = adapter.resident_bytes
        assert f"{size_text(process_and_a)} in memory" in run("adapters")[1]
        assert run("unload", "prod")[:2] == (0, "prod: unloaded; its memory has been freed\n")
        assert answer(base=True) == base
        with pytest.raises(ServiceError, match="NOT_FOUND"):
            server.client.generate("Hello", adapter="prod")
    assert server.log[-1] == "loraf-serve: stopped"
