"""Clients learn the base model's name, and not in which folders it was trained."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from loraf import manifest
from loraf.errors import BaseMismatch
from loraf.four_bits import four_bit_note
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.service import messages
from tests.loraf_serve.harness import checkpoint_folder
from tests.standins import make_model, random_checkpoint


@pytest.mark.parametrize(
    ("trained", "shown"),
    [
        ("tiny", "tiny"),
        ("org/model-7b", "org/model-7b"),
        ("/home/alice/secret/model", "model"),
        ("/home/alice/secret/model/", "model"),
        ("./secret/model", "model"),
        ("../model", "model"),
        ("secret/dir/model", "model"),
        ("C:\\Users\\alice\\model", "model"),
    ],
)
def test_the_base_of_a_listed_adapter(trained, shown):
    read = manifest.read(checkpoint_folder())
    changed = dataclasses.replace(read, base_model=dataclasses.replace(read.base_model, name=trained))
    if trained != shown:  # the name of a folder says little
        shown += f", fingerprint {read.base_model.fingerprint[:12]}"
    assert messages.adapter(ServedAdapter("a", checkpoint_folder(), changed), 0).base_model == shown


def test_an_adapter_that_was_trained_on_four_bits_says_so():
    read = manifest.read(checkpoint_folder())
    first, *others = read.tasks
    training = {"settings": {"quantization": "bnb-4bit"}}
    changed = dataclasses.replace(read, tasks=(dataclasses.replace(first, training=training), *others))
    assert messages.adapter(ServedAdapter("a", checkpoint_folder(), changed), 0).base_model.endswith(
        "in four bits (bnb-4bit)"
    )
    note = four_bit_note(changed.tasks)
    assert note.startswith(f"trained on the base in four bits (bnb-4bit): {first.name};") and "plain ones" in note
    assert four_bit_note(read.tasks) == ""


def test_a_refused_load_names_the_base_without_its_folders(tmp_path):
    trained = make_model("llama", tmp_path / "home" / "alice" / "model")
    random_checkpoint(tmp_path / "root" / "ck", trained)
    other = make_model("llama", tmp_path / "served", seed=1)
    shutil.rmtree(trained)
    root = AdapterRoot(tmp_path / "root", other)
    with pytest.raises(BaseMismatch) as error:
        root.open("a", root.find("ck", ()))
    shown = str(root.shown(error.value))
    assert "use model" in shown and "alice" not in shown and str(tmp_path) not in shown
