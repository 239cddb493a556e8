"""`loraf-serve --revision`, and a revision in `--adapter`."""

from __future__ import annotations

import pytest

from loraf.errors import ConfigError
from loraf_serve import cli
from loraf_serve.adapters.adapter_spec import AdapterSpec, parse_spec
from tests.loraf_serve.harness import checkpoint_folder, model_folder
from tests.loraf_train import fake_hub


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_revision_stands_between_the_checkpoint_and_its_tasks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a#b").mkdir()
    (tmp_path / "ckpt").mkdir()
    for text, spec in {
        "org/name#v1": AdapterSpec("", "name", "org/name", None, "v1"),
        "mine=org/name#refs/pr/1@math+nlu": AdapterSpec("", "mine", "org/name", ("math", "nlu"), "refs/pr/1"),
        "mine=a#b@math": AdapterSpec("", "mine", "a#b", ("math",), None),
    }.items():
        assert parse_spec(text) == AdapterSpec(text, spec.name, spec.source, spec.tasks, spec.revision)
    with pytest.raises(ConfigError, match="'' is not a revision"):
        parse_spec("org/name#@math")
    with pytest.raises(ConfigError, match="is a local folder, which has no revisions"):
        parse_spec("mine=./ckpt#main")


def test_model_and_adapter_are_served_at_their_revisions_which_are_printed(monkeypatch, tmp_path, capsys):
    model, adapter = content(model_folder()), content(checkpoint_folder())
    with fake_hub.served(monkeypatch, tmp_path) as hub:
        hub.commits["org/model"] = [model, model | {"config.json": b"{}"}]
        hub.commits["org/adapter"] = [adapter, {"loraf.json": b"{}"}]
        commits = {name: hub.oid(name, 1) for name in hub.commits}
        served = []

        def stop(backend, model, *others):
            served.append(model)
            raise ConfigError([])

        monkeypatch.setattr("loraf_serve.choose_backend.choose", stop)
        options = ["--model", "org/model", "--revision", commits["org/model"]]
        assert cli.main([*options, "--adapter", f"org/adapter#{commits['org/adapter']}"]) == 2
    (folder,) = served
    assert content(folder) == model
    printed = capsys.readouterr().out
    assert f"model org/model at {commits['org/model']}" in printed
    assert f"adapter adapter: org/adapter at {commits['org/adapter']}" in printed


def test_a_model_that_is_not_on_the_hub_has_no_revision(capsys):
    for name in ("tiny", str(model_folder())):
        assert cli.main(["--model", name, "--revision", "main"]) == 2
        error = capsys.readouterr().err
        assert "--revision: " in error and "has no revisions" in error
