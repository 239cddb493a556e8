"""Checkpoints to the hub and back, with the real client and a fake hub (tests/loraf_train/fake_hub.py)."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf_train import card as model_card
from loraf_train.cli import main
from tests.loraf.small_manifests import WHOLE, a_manifest, a_task
from tests.loraf_train import fake_hub
from tests.loraf_train.command_line import digests, run
from tests.standins import make_model, random_checkpoint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    make_model("llama", folder / "model")
    random_checkpoint(folder / "ckpt", folder / "model", tasks=("math", "nlu"))
    return folder


@pytest.fixture
def ckpt(prepared, tmp_path):
    return shutil.copytree(prepared / "ckpt", tmp_path / "ckpt")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.served(monkeypatch, tmp_path) as hub:
        yield hub


def content(folder, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


FILES = ("loraf.json", "tasks/math.safetensors", "tasks/nlu.safetensors")


def test_only_the_checkpoints_own_files_and_a_card_are_uploaded_in_one_commit(ckpt, hub, capsys):
    for name in ("runs/math/training/events", ".resume/state-1.json", "tasks/stray.safetensors", "notes.txt", ".env"):
        (ckpt / name).parent.mkdir(parents=True, exist_ok=True)
        (ckpt / name).write_text("secret")
    before = digests(ckpt)
    status, out, err = run(capsys, "push", str(ckpt), "org/adapter", "--private")
    assert status == 0, err
    card = model_card.card(manifests.read(ckpt), "org/adapter").encode()
    assert hub.files("org/adapter") == content(ckpt, *FILES) | {".gitattributes": b"", "README.md": card}
    assert len(hub.commits["org/adapter"]) == 2  # creating the repository, and one commit
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.messages == ["LoRAF adapter: math, nlu"]
    assert manifests.read(ckpt).adapter_digest in out and "/commit/" in out
    assert "a folder on this machine" in err  # the test model is named by its path
    assert digests(ckpt) == before


def test_a_card_that_save_pretrained_wrote_is_made_for_what_is_pushed(ckpt, hub, capsys):
    (ckpt / "README.md").write_text(f"# ckpt\n\nwith `statistics/`\n\n{model_card.GENERATED}\n")
    assert run(capsys, "push", str(ckpt), "org/adapter")[0] == 0
    expected = model_card.card(manifests.read(ckpt).without_statistics(), "org/adapter").encode()
    assert hub.files("org/adapter")["README.md"] == expected
    assert run(capsys, "card", str(ckpt), "--write")[0] == 0  # it may be replaced
    assert run(capsys, "card", str(ckpt), "--write")[0] == 2  # now it is the user's


def test_a_pushed_checkpoint_is_downloaded_by_its_name(ckpt, hub, capsys, prepared, tmp_path):
    assert run(capsys, "push", str(ckpt), "org/adapter")[0] == 0
    status, out, err = run(capsys, "inspect", "org/adapter", "--json", "--verify")
    assert status == 0, err
    assert json.loads(out)["adapter_digest"] == manifests.read(ckpt).adapter_digest
    (folder,) = (tmp_path / "hub").glob("models--org--adapter/snapshots/*")
    assert content(folder, *FILES) == content(ckpt, *FILES)
    assert Checkpoint.open(folder).manifest == Checkpoint.open(ckpt).manifest
    out_folder = tmp_path / "peft"
    arguments = ["--tasks", "math", "--format", "peft", "--out", str(out_folder), "--model", str(prepared / "model")]
    assert run(capsys, "export", "org/adapter", *arguments)[0] == 0
    assert (out_folder / "adapter_model.safetensors").is_file()


def test_the_server_loads_it_by_the_same_name(ckpt, hub, capsys, prepared):
    from loraf_serve.adapters.adapter_spec import open_adapter, parse_spec

    assert run(capsys, "push", str(ckpt), "org/adapter")[0] == 0
    adapter = open_adapter(parse_spec("org/adapter@nlu"), prepared / "model")
    assert adapter.checkpoint.manifest.task_names == ("nlu",)


def test_pushing_again_deletes_removed_tasks_and_keeps_other_files(ckpt, hub, capsys):
    assert run(capsys, "push", str(ckpt), "org/adapter")[0] == 0
    hub.commits["org/adapter"][-1] |= {"tasks/old.safetensors": b"x", "LICENSE": b"mine", "tasks/notes.txt": b"mine"}
    (ckpt / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    status, out, _ = run(capsys, "push", str(ckpt), "org/adapter", "--message", "second")
    assert status == 0 and "deleted 1 old file" in out
    files = hub.files("org/adapter")
    assert set(files) == {*FILES, ".gitattributes", "README.md", "LICENSE", "tasks/notes.txt"}
    assert files["README.md"] == b"---\nlicense: mit\n---\n# My own words\n"
    assert hub.messages[-1] == "second"


def test_a_damaged_checkpoint_is_not_pushed(ckpt, hub, capsys):
    file = ckpt / "tasks/math.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    status, _, err = run(capsys, "push", str(ckpt), "org/adapter")
    assert status == 2 and "math.safetensors" in err
    assert hub.commits == {}


@pytest.mark.parametrize("name", ["adapter", "org/a/b", "org/", "../x", "org/a b"])
def test_a_name_that_is_not_a_hub_id_is_refused(ckpt, hub, capsys, name):
    status, _, err = run(capsys, "push", str(ckpt), name)
    assert status == 2 and "is not a hub id → write org/name" in err
    assert hub.commits == {}


def test_a_failed_upload_or_download_is_reported(ckpt, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    status, _, err = run(capsys, "push", str(ckpt), "org/adapter")
    assert status == 2 and "the upload to the hub failed" in err and "hf auth login" in err and "Traceback" not in err
    status, _, err = run(capsys, "inspect", "org/none")
    assert status == 2 and "org/none is not a local folder and could not be downloaded from the hub" in err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    status, _, err = run(capsys, "push", str(ckpt), "org/adapter", "--revision", "nowhere")
    assert status == 2 and "--revision" in err


# --- statistics ------------------------------------------------------------------------------------------------------

STATISTICS = "statistics/math.safetensors"


@pytest.fixture
def protected(ckpt):
    """A checkpoint with statistics of one task."""
    Checkpoint.open(ckpt).set_statistics("math", b"moments")
    return ckpt


def test_statistics_are_left_out_of_a_push_and_of_its_manifest(ckpt, hub, capsys):
    plain = (ckpt / "loraf.json").read_bytes()
    Checkpoint.open(ckpt).set_statistics("math", b"moments")
    before = digests(ckpt)
    status, out, err = run(capsys, "push", str(ckpt), "org/adapter")
    assert status == 0, err
    assert "left out the tasks' statistics; --with-statistics uploads them too" in out
    files = hub.files("org/adapter")
    assert set(files) == {*FILES, ".gitattributes", "README.md"}
    assert files["loraf.json"] == plain  # format version 1, as if there had never been any
    assert b"statistics" not in files["README.md"]
    assert run(capsys, "inspect", "org/adapter", "--verify")[0] == 0
    assert digests(ckpt) == before


def test_pushed_statistics_are_whole_and_described_and_deleted_by_the_next_push(protected, hub, capsys):
    status, out, err = run(capsys, "push", str(protected), "org/adapter", "--with-statistics")
    assert status == 0, err
    assert "pushed 4 files" in out and "7 of statistics" in out and "no text" in out
    files = hub.files("org/adapter")
    assert {name: files[name] for name in (*FILES, STATISTICS)} == content(protected, *FILES, STATISTICS)
    card = files["README.md"].decode()
    assert "## Statistics" in card and "moments of the activations and gradients" in card
    assert "| format | loraf 2 |" in card
    status, out, err = run(capsys, "inspect", "org/adapter", "--verify", "--json")
    assert status == 0, err
    assert json.loads(out)["tasks"][0]["statistics"]["bytes"] == 7
    assert run(capsys, "card", "org/adapter")[1] == card
    status, out, _ = run(capsys, "push", str(protected), "org/adapter")
    assert status == 0 and "deleted 1 old file" in out and STATISTICS not in hub.files("org/adapter")


def test_the_card_of_a_folder_describes_statistics_only_if_they_are_pushed(protected, capsys):
    assert "## Statistics" not in run(capsys, "card", str(protected))[1]
    assert "## Statistics" in run(capsys, "card", str(protected), "--with-statistics")[1]


def test_damaged_statistics_are_not_pushed_but_do_not_keep_the_tasks_from_it(protected, hub, capsys):
    (protected / STATISTICS).write_bytes(b"momentS")
    status, _, err = run(capsys, "push", str(protected), "org/adapter", "--with-statistics")
    assert status == 2 and STATISTICS in err and "SHA-256" in err
    assert hub.commits == {}
    assert run(capsys, "push", str(protected), "org/adapter")[0] == 0


def test_the_server_neither_downloads_nor_reads_statistics(protected, hub, capsys, prepared, tmp_path):
    from loraf_serve.adapters.adapter_spec import open_adapter, parse_spec

    Checkpoint.open(protected).set_named_set("support", {"math": 0.5, "nlu": 1.0})
    assert run(capsys, "push", str(protected), "org/adapter", "--with-statistics")[0] == 0
    adapter = open_adapter(parse_spec("org/adapter"), prepared / "model")
    assert adapter.checkpoint.manifest == manifests.read(protected)
    assert not list((tmp_path / "hub").rglob(STATISTICS))
    (protected / STATISTICS).unlink()
    adapter = open_adapter(parse_spec(f"mine={protected}"), prepared / "model")
    assert set(adapter.checkpoint.tasks) == {"math", "nlu"}


def test_named_sets_are_pushed_and_on_the_card(ckpt, hub, capsys):
    Checkpoint.open(ckpt).set_named_set("support", {"math": 0.5, "nlu": 1.0})
    assert run(capsys, "push", str(ckpt), "org/adapter")[0] == 0
    files = hub.files("org/adapter")
    assert files["loraf.json"] == (ckpt / "loraf.json").read_bytes()
    assert "- `support`: the set `math:0.5+nlu`" in files["README.md"].decode().splitlines()


# --- cards -----------------------------------------------------------------------------------------------------------


def header(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_card_holds_the_facts_of_the_manifest():
    settings = {
        "calibration": {"steps": 32, "optimizer": "adamw"},
        "training": {"learning_rate": 5e-4, "epochs": 3.0, "max_steps": None},
        "data": {"train": [{"dataset": "openai/gsm8k"}, {"dataset": "/home/me/set"}, {"file": "a.jsonl"}]},
    }
    first, second = WHOLE.tasks
    score = {"set": "math+nlu", "evaluation": "a|b", "metric": "loss", "score": 1.25, "count": 1319}
    first = a_task("math", templates=first.templates, training={"settings": settings, "examples": 7473, "steps": 702})
    second = a_task("nlu", alpha=128.0, trained_with=("math",), scores=(score,))
    manifest = a_manifest(tasks=(first, second))
    text = model_card.card(manifest, "me/adapter")
    assert header(text) == {
        "library_name": "loraf",
        "pipeline_tag": "text-generation",
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "tags": ["loraf", "lora", "continual-learning", "math", "nlu"],
        "datasets": ["openai/gsm8k"],
    }
    assert "license" not in header(text) and "# license: fill in" in text
    for line in [
        "# adapter",
        "| nlu | math | 128 | 0.75 | 17 | bfloat16 | 100 B |",
        "| math+nlu | nlu | a\\|b | loss | 1.2500 | 1319 |",
        "loraf-serve --model org/model --adapter me/adapter",
        "- `nlu`: `--as-trained nlu` is the set `math+nlu`",
        "- 7,473 examples, 702 steps",
        "- training: learning_rate 0.0005, epochs 3",
        '- prompt: `"Q: {question}\\n»ä«"`',
        f"| adapter digest | {manifest.adapter_digest} |",
    ]:
        assert line in text.splitlines(), line
    assert "/home/me" not in text


def test_a_card_does_not_reveal_the_path_of_a_local_base():
    base = manifests.BaseModel("/home/me/models/llama", "LlamaForCausalLM", "f" * 64)
    text = model_card.card(a_manifest(base_model=base, tasks=()), "x")
    assert "base_model" not in header(text)
    assert "/home/me" not in text and "`llama` (a local folder when it was trained)" in text
    assert "No scores were measured." in text and "no task yet" in text


@pytest.mark.parametrize("template", ["`", "a `` b", "```sh\n{x}\n```", "| x |", "---\n# y"])
def test_templates_do_not_break_out_of_the_card(template):
    task = a_task("t", templates=manifests.Templates(template, "{a}"))
    text = model_card.card(a_manifest(tasks=(task,)), "x")
    (line,) = (line for line in text.splitlines() if line.startswith("- prompt: "))
    span = line.removeprefix("- prompt: ")
    fence = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(fence) and fence not in span[len(fence) : -len(fence)]
    assert json.loads(span[len(fence) : -len(fence)].strip()) == template


def test_the_card_command_prints_or_writes_the_card(ckpt, capsys):
    status, out, _ = run(capsys, "card", str(ckpt), "--name", "org/adapter")
    assert status == 0 and out == model_card.card(manifests.read(ckpt), "org/adapter")
    assert not (ckpt / "README.md").exists()
    assert run(capsys, "card", str(ckpt), "--name", "org/adapter", "--write")[0] == 0
    assert (ckpt / "README.md").read_text() == out
    status, _, err = run(capsys, "card", str(ckpt), "--write")
    assert status == 2 and "README.md: already exists" in err
    status, _, err = run(capsys, "card", str(ckpt / "none"))
    assert status == 2 and "no loraf.json" in err
    assert main(["inspect", str(ckpt), "--verify"]) == 0  # README.md does not matter
