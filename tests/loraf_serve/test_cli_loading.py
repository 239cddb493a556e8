"""`--adapter-root` and `--adapter-memory`: what is refused at start, and the whole way once with the merged backend."""

from __future__ import annotations

import pytest

from loraf.units import size_text
from loraf_serve import choose_backend, cli, client_cli
from loraf_serve.client import ServiceError
from loraf_serve.launch import launch
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, model_folder


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["--model", str(model_folder()), "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_root_that_is_not_a_folder_is_named_with_the_other_mistakes(capsys, tmp_path):
    text = refused(capsys, "--adapter-root", str(tmp_path / "nowhere"), "--grace", "-1", "--adapter", "./none")
    assert f"{tmp_path / 'nowhere'}: --adapter-root: is not a folder → name the folder" in text
    assert "--grace" in text and "./none" in text


def test_a_value_that_is_not_a_size_ends_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--model", "tiny", "--adapter-memory", "2Gb"])
    assert error.value.code == 2
    assert "'2Gb' is not a size: write a number of bytes, or for example 500MB or 2GiB" in capsys.readouterr().err


def test_adapters_that_do_not_fit_at_start_are_a_mistake_of_the_user(capsys, monkeypatch):
    monkeypatch.setattr(choose_backend, "choose", lambda *a: choose_backend.BackendChoice(FakeBackend(), "a test"))
    text = refused(capsys, "--adapter", str(checkpoint_folder()), "--adapter-memory", "10KiB")
    assert "--adapter-memory: this adapter takes 43.01 kB, and 0 B of the 10.24 kB for all adapters are taken →" in text


@pytest.mark.slow
def test_end_to_end_with_the_merged_backend(capsys):
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
