"""Models and checkpoints by their names on the hub: which files are downloaded, and of which revision."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers

from loraf import base_model, hub
from loraf.errors import ConfigError
from tests.loraf_train import fake_hub

NEEDED = {
    *("config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    *("model-00002-of-00002.safetensors", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.model.v3", "qwen.tiktoken"),
}
UNWANTED = {
    *("pytorch_model.bin", "model.pt", "modeling_own.py", "tokenizer_own.py", "tokenizer.pt", "vocab.pkl", "a.gguf"),
    *("consolidated.safetensors", "original/consolidated.00.pth", "original/tokenizer.model", "onnx/config.json"),
    *("fp16/model.safetensors", "fp16/merges.txt", "README.md"),
}


def tokenizer_files() -> set[str]:
    """The names of files that transformers' tokenizers are read from."""
    names: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        source = path.read_text(encoding="utf-8")
        if "VOCAB_FILES_NAMES = {" in source:
            found = source.split("VOCAB_FILES_NAMES = ")[1]
            names |= set(ast.literal_eval(found[: found.index("}") + 1]).values())
    assert {"vocab.json", "merges.txt", "vocab.txt", "spiece.model"} <= names
    return {name for name in names if not name.endswith((".pkl", ".bin", ".pt"))}


def test_a_model_is_downloaded_with_every_file_of_its_tokenizer_and_nothing_else(monkeypatch, tmp_path):
    needed = NEEDED | tokenizer_files()
    with fake_hub.served(monkeypatch, tmp_path) as there:
        there.commits["org/model"] = [dict.fromkeys(needed | UNWANTED, b"{}")]
        folder = base_model.resolve("org/model")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == needed


def test_a_revision_is_the_one_that_is_downloaded(monkeypatch, tmp_path):
    with fake_hub.served(monkeypatch, tmp_path) as there:
        there.commits["org/both"] = [
            {"config.json": b"{}", "loraf.json": b"1"},
            {"config.json": b"[]", "loraf.json": b"2"},
        ]
        first, last = there.oid("org/both", 1), there.oid("org/both", 2)
        assert (base_model.resolve("org/both", first) / "config.json").read_text() == "{}"
        assert (base_model.resolve("org/both") / "config.json").read_text() == "[]"
        old, new = hub.checkpoint_folder(f"org/both#{first}"), hub.checkpoint_folder("org/both")
        assert [(folder / "loraf.json").read_text() for folder in (old, new)] == ["1", "2"]
        assert [hub.loaded_from_hub(folder) for folder in (old, new)] == [f"org/both at {first}", f"org/both at {last}"]
        with pytest.raises(ConfigError, match=r"org/both at v9 is not a local folder and could not be downloaded"):
            hub.checkpoint_folder("org/both#v9")
    assert hub.loaded_from_hub(tmp_path) == ""


def test_a_revision_follows_a_hub_id_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("ckpt", "old#1", "org/here"):
        Path(name).mkdir(parents=True)
    for text in ("ckpt", "./ckpt", "old#1", "org/name", "./nowhere#1", "nowhere#1"):
        assert hub.split_revision(text) == (text, None)
    assert hub.split_revision("org/name#refs/pr/1") == ("org/name", "refs/pr/1")
    for text in ("ckpt#main", "./ckpt#main", "org/here#main"):
        with pytest.raises(ConfigError, match="is a local folder, which has no revisions"):
            hub.split_revision(text)
    for revision in ("", "a b", "../../x", "a//b", "/a", "a\n"):
        with pytest.raises(ConfigError, match="is not a revision"):
            hub.split_revision(f"org/name#{revision}")
        with pytest.raises(ConfigError, match="--revision: .* is not a revision"):
            base_model.require_revision("org/name", revision, "--revision")


def test_statistics_are_downloaded_only_on_request(monkeypatch, tmp_path):
    files = {"loraf.json", "tasks/math.safetensors", "tasks/nlu.safetensors", "statistics/math.safetensors"}
    with fake_hub.served(monkeypatch, tmp_path) as there:
        there.commits["org/ckpt"] = [dict.fromkeys(files, b"x")]

        def downloaded(**options) -> set[str]:
            folder = hub.checkpoint_folder("org/ckpt", **options)
            return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

        assert downloaded(tasks=["math"]) == {"loraf.json", "tasks/math.safetensors"}
        assert downloaded() == files - {"statistics/math.safetensors"}
        assert downloaded(statistics=True) == files
