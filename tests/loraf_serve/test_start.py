"""The start of a server: task files are read once, by the process that keeps their values, and damage is reported."""

from __future__ import annotations

import shutil

import pytest

from loraf.errors import CorruptCheckpoint
from loraf_serve import choose_backend, cli
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.backends.merged import MergedBackend
from tests.loraf_serve.damage import change_the_seed, damaged, flip_a_bit
from tests.loraf_serve.fake_backend import ReadingBackend
from tests.loraf_serve.harness import checkpoint_folder, counting_opens, model_folder, serving

TASK_FILES = ("math.safetensors", "nlu.safetensors", "code.safetensors")


@pytest.mark.parametrize(
    ("damage", "file", "says"),
    [(flip_a_bit, "tasks/nlu.safetensors", "SHA-256"), (change_the_seed, "loraf.json", "seed")],
)
@pytest.mark.parametrize("backend", ["merged", "reads itself"])
def test_damage_that_only_reading_shows_ends_the_start_with_2_and_names_the_file(
    tmp_path, capsys, monkeypatch, backend, damage, file, says
):
    """Each task file is read once, by the process that keeps its values, and no request is served before."""
    folder = damaged(tmp_path, damage)
    reading = ReadingBackend()
    if backend == "reads itself":
        monkeypatch.setattr(choose_backend, "choose", lambda *a: choose_backend.BackendChoice(reading, "a test"))
    options = ("--backend", "merged", "--dtype", "float32", "--port", "0")
    with counting_opens(folder / "tasks") as opens:
        assert cli.main(["--model", str(model_folder()), "--adapter", str(folder), *options]) == 2
    captured = capsys.readouterr()
    assert f"{folder / file}: " in captured.err and says in captured.err and "→" in captured.err
    assert "Traceback" not in captured.err and "listening" not in captured.out and "verified" not in captured.out
    assert opens == dict.fromkeys(TASK_FILES, 1)
    assert reading.state == ("stopped" if backend == "reads itself" else "new")


def test_damage_in_several_checkpoints_is_named_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choose_backend, "choose", lambda *a: choose_backend.BackendChoice(ReadingBackend(), "a test"))
    one, two = damaged(tmp_path / "one", flip_a_bit), damaged(tmp_path / "two", change_the_seed)
    adapters = ("--adapter", f"a={one}", "--adapter", f"b={two}")
    assert cli.main(["--model", str(model_folder()), "--port", "0", *adapters]) == 2
    text = capsys.readouterr().err
    assert str(one / "tasks/nlu.safetensors") in text and str(two / "loraf.json") in text


@pytest.mark.parametrize("backend", [lambda: MergedBackend(model_folder(), "float32"), ReadingBackend])
def test_each_task_file_is_read_once_at_start_even_under_two_names(tmp_path, backend):
    folder = shutil.copytree(checkpoint_folder(), tmp_path / "ckpt")
    with counting_opens(folder / "tasks") as opens:
        adapters = check_adapters([f"a={folder}", f"b={folder}"], model_folder())
        assert not opens
        with serving(backend, adapters) as running:
            assert [adapter.name for adapter in running.client.adapters()] == ["a", "b"]
            running.client.generate("Hello", adapter="b", max_tokens=1)
    assert opens == dict.fromkeys(TASK_FILES, 1)


def test_a_checkpoint_that_changes_after_its_manifest_was_read_is_refused(tmp_path):
    folder = shutil.copytree(checkpoint_folder(), tmp_path / "ckpt")
    adapters = check_adapters([str(folder)], model_folder())
    shutil.rmtree(folder)
    shutil.copytree(checkpoint_folder(1), folder)
    with pytest.raises(CorruptCheckpoint, match="was changed while it was being loaded"), serving(adapters=adapters):
        pass
