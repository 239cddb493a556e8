"""The continual-learning benchmarks: their files load and fit the model, and the data are converted as they say."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from loraf_train.grading.builtin import first_choice
from loraf_train.sequence.conflicts import capacity
from loraf_train.settings.config import RunConfig
from loraf_train.settings.loading import load
from tests.loraf_train.command_line import run
from tests.records import ROOT

EXAMPLE = ROOT / "examples" / "continual"
STANDARD = {"dbpedia", "amazon", "yahoo", "agnews"}
FILES = {  # file → its tasks
    **{f"standard-{n}": STANDARD for n in (1, 2, 3)},
    **{f"standard-five-{n}": STANDARD | {"yelp"} for n in (1, 2, 3)},
    **dict.fromkeys(
        ("long-4", "long-5", "long-6"),
        STANDARD | {"yelp", "imdb", "sst-2", "mnli", "cb", "rte", "boolqa", "multirc", "qqp", "wic", "copa"},
    ),
    "trace": {"c-stance", "fomc", "meetingbank", "py150", "scienceqa", "numglue-cm", "numglue-ds", "20minuten"},
}
# As the scripts of cmnfriend/O-LoRA (orders 1, 2, 3 and 6) and of BeyonderXX/TRACE have them, at the commits of 2024.
PUBLISHED_ORDERS = {
    "standard-1": "dbpedia amazon yahoo agnews",
    "standard-2": "dbpedia amazon agnews yahoo",
    "standard-3": "yahoo amazon agnews dbpedia",
    "long-6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
    "trace": "c-stance fomc meetingbank py150 scienceqa numglue-cm numglue-ds 20minuten",
}
# Llama 2 7B: (d_out, d_in) of each projection, 32 layers (its config.json: hidden 4096, MLP 11008, no grouped heads).
LLAMA_LAYERS = 32
LLAMA = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


get_data = module_of("get_data")
metrics = module_of("trace_metrics")


# --- stand-ins for the two origins ------------------------------------------------------------------------------------


def classification_records(name: str) -> list[dict[str, str]]:
    """One record for each label, and one that is marked as MNLI's unlabelled ones are."""
    folder = name.rpartition("/")[0]
    labels = dict(get_data.LABELS.values())[folder]
    marked = [*labels, "-"] if folder == "NLI/MNLI" else labels
    return [{"label": label, "sentence": f"Text: {name} {i}\n"} for i, label in enumerate(marked)]


def github(urls: list[str]) -> Callable[[str], bytes]:
    """Stands in for the repository; the URLs of all requests are added to `urls`."""

    def fetch(url: str) -> bytes:
        urls.append(url)
        return json.dumps(classification_records(url.removeprefix(f"{get_data.CLASSIFICATION}/"))).encode()

    return fetch


def trace_archive(answers: dict[str, str] | None = None, prompt: str = "Which one?\n") -> bytes:
    """An archive in the form of TRACE's, with two variants and two records a file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for variant, count in ((get_data.VARIANT, 2), ("LLM-CL-Benchmark_500", 1)):
            for task, folder in get_data.TRACE_TASKS.items():
                for part in (*get_data.PARTS, "eval"):
                    record = {"prompt": prompt, "answer": (answers or {}).get(task, "A")}
                    archive.writestr(f"TRACE-Benchmark/{variant}/{folder}/{part}.json", json.dumps([record] * count))
    return content.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The example's files, with converted records in the places that they name."""
    folder = tmp_path_factory.mktemp("continual")
    for file in EXAMPLE.glob("*"):
        if file.suffix in (".yaml", ".py"):
            shutil.copy(file, folder)
    digests = get_data.Digests(folder / "digests.json")
    get_data.get_classification(folder / "data" / "classification", github([]), digests)
    get_data.get_trace(folder / "data" / "trace", lambda url: trace_archive(), digests)
    return folder


# --- the files --------------------------------------------------------------------------------------------------------


def names(config: RunConfig) -> list[str]:
    return [task.name for task in config.tasks]


def test_every_file_of_the_example_is_tested():
    assert {file.stem for file in EXAMPLE.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("stem", FILES)
def test_a_file_loads_and_its_tasks_fit_the_model(stem, folder):
    config = load(folder / f"{stem}.yaml")
    assert set(names(config)) == FILES[stem] and len(config.tasks) == len(FILES[stem])
    assert config.model == "meta-llama/Llama-2-7b-chat-hf"
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LLAMA_LAYERS) for name, shape in LLAMA.items()}
    assert capacity(config, shapes) == []
    assert all(task.data.eval for task in config.tasks)


def test_the_sequence_of_15_is_trained_at_95_per_cent_sparsity(folder):
    for n in (4, 5, 6):
        assert {task.sparsity for task in load(folder / f"long-{n}.yaml").tasks} == {0.95}


def test_the_orders_are_the_published_ones_and_the_five_tasks_begin_with_yelp(folder):
    order = {stem: names(load(folder / f"{stem}.yaml")) for stem in FILES}
    assert {stem: " ".join(order[stem]) for stem in PUBLISHED_ORDERS} == PUBLISHED_ORDERS
    for stems in (("standard-1", "standard-2", "standard-3"), ("long-4", "long-5", "long-6")):
        assert len({tuple(order[stem]) for stem in stems}) == 3
    for n in (1, 2, 3):
        assert order[f"standard-five-{n}"] == ["yelp", *order[f"standard-{n}"]]


def test_a_task_is_asked_in_the_same_way_in_every_file_that_has_it(folder):
    """Epochs and sparsity belong to the sequence, everything else to the task."""
    seen = {}
    for stem in FILES:
        for task in load(folder / f"{stem}.yaml").tasks:
            entry = (task.data, task.metric, task.max_new_tokens, task.alpha)
            assert seen.setdefault(task.name, entry) == entry, (stem, task.name)


def test_prompts_and_choices_have_the_labels_of_the_data(folder):
    for stem in set(FILES) - {"trace"}:
        for task in load(folder / f"{stem}.yaml").tasks:
            labels = get_data.LABELS[task.name][1]
            (evaluation,) = task.data.eval.values()
            assert evaluation.choices == labels
            assert task.name == "copa" or f"Answer with one of: {', '.join(labels)}.\n" in task.data.prompt
            assert [first_choice(f" {label}", labels) for label in labels] == list(labels)


@pytest.mark.parametrize("stem", FILES)
def test_the_head_of_a_file_says_what_it_stands_beside(stem):
    text = (EXAMPLE / f"{stem}.yaml").read_text()
    head = text[: text.index("\nmodel:")].replace("\n# ", " ")
    figures = {"standard": ("80.4", "77.2"), "long": ("74.8", "73.5"), "trace": ("48.4", "+7.1")}
    for figure in figures[stem.partition("-")[0]]:
        assert figure in head
    for words in ("Stands beside", "Base model", "test split", "Metric", "not verified", "--set retention=off"):
        assert words in head, words
    assert f"loraf-train run examples/continual/{stem}.yaml" in head


@pytest.mark.parametrize("stem", ["standard-five-1", "trace"])
@pytest.mark.slow
def test_a_file_runs_at_small_scale(stem, folder, tmp_path, capsys):
    changes = ["model=tiny", f"output={tmp_path}/ckpt", "training.batch_size=2", "training.micro_batch_size=2"]
    changes += ["training.max_steps=1", "training.max_length=512", "calibration.steps=1"]
    changes += [f"tasks.{name}.max_new_tokens=4" for name in FILES[stem]]
    arguments = [argument for change in changes for argument in ("--set", change)]
    status, out, err = run(capsys, "run", str(folder / f"{stem}.yaml"), *arguments, "--eval-limit", "1")
    assert status == 0, err
    manifest = json.loads((tmp_path / "ckpt" / "loraf.json").read_text())
    assert {task["name"] for task in manifest["tasks"]} == FILES[stem]
    assert all(0 <= score["score"] <= 1 for task in manifest["tasks"] for score in task["scores"])


# --- get_data.py ------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, str]]:
    return json.loads(file.read_text())


def test_records_are_trimmed_and_those_without_a_label_left_out(folder):
    converted = read(folder / "data/classification/mnli/test.json")
    labels = get_data.LABELS["mnli"][1]
    assert [record["label"] for record in converted] == list(labels)
    assert converted[0]["sentence"] == "Text: NLI/MNLI/test.json 0"


def test_every_url_names_the_commit_and_existing_files_are_kept(tmp_path):
    urls: list[str] = []
    digests = get_data.Digests(tmp_path / "digests.json")
    get_data.get_classification(tmp_path, github(urls), digests)
    assert len(urls) == 2 * len(get_data.LABELS)
    assert all(re.search(r"/cmnfriend/O-LoRA/[0-9a-f]{40}/CL_Benchmark/", url) for url in urls)
    (tmp_path / "cb" / "test.json").unlink()
    get_data.get_classification(tmp_path, github(urls), digests)
    assert urls[-1].endswith("/NLI/CB/test.json") and len(urls) == 2 * len(get_data.LABELS) + 1


def test_a_digest_is_recorded_at_the_first_download_and_compared_afterwards(tmp_path):
    file = tmp_path / "digests.json"
    get_data.get_classification(tmp_path / "one", github([]), get_data.Digests(file))
    get_data.get_trace(tmp_path / "one", lambda url: trace_archive(), get_data.Digests(file))
    recorded = json.loads(file.read_text())
    assert len(recorded) == 2 * len(get_data.LABELS) + 1 and get_data.ARCHIVE in recorded

    get_data.get_classification(tmp_path / "again", github([]), get_data.Digests(file))
    with pytest.raises(ValueError, match=r"TC/agnews/train.json: the download has SHA-256 .*, not .*digests.json"):
        get_data.get_classification(tmp_path / "other", lambda url: b"[]", get_data.Digests(file))
    with pytest.raises(ValueError, match=f"{get_data.ARCHIVE}: the download has SHA-256"):
        other = trace_archive({"fomc": "B"})
        get_data.get_trace(tmp_path / "other", lambda url: other, get_data.Digests(file))
    assert not (tmp_path / "other").exists() and json.loads(file.read_text()) == recorded


def test_the_committed_digests_belong_to_files_that_are_fetched():
    fetched = {f"{folder}/{part}.json" for folder, _ in get_data.LABELS.values() for part in get_data.PARTS}
    known = json.loads((EXAMPLE / "digests.json").read_text())
    assert known.keys() <= fetched | {get_data.ARCHIVE}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in known.values())


def test_a_malformed_file_is_neither_written_nor_recorded(tmp_path):
    digests = get_data.Digests(tmp_path / "digests.json")
    with pytest.raises(ValueError, match="TC/agnews/train.json: record 1 does not have the texts sentence and label"):
        get_data.get_classification(tmp_path / "data", lambda url: b'[{"text": "x"}]', digests)
    with pytest.raises(ValueError, match="TC/agnews/train.json is not JSON"):
        get_data.get_classification(tmp_path / "data", lambda url: b"<html>", get_data.Digests(tmp_path / "d.json"))
    assert not list(tmp_path.iterdir())


def test_traces_archive_is_unpacked_from_the_variant_with_5000_records(folder):
    converted = read(folder / "data/trace/20minuten/test.json")
    assert converted == [{"prompt": "Which one?\n", "answer": "A"}] * 2
    assert {path.name for path in (folder / "data/trace/fomc").iterdir()} == {"train.json", "test.json"}


def test_a_long_prompt_of_trace_loses_its_beginning(tmp_path):
    archive = trace_archive(prompt="x" * 9000 + " end?")
    get_data.get_trace(tmp_path / "data", lambda url: archive, get_data.Digests(tmp_path / "digests.json"))
    prompt = read(tmp_path / "data/py150/train.json")[0]["prompt"]
    assert len(prompt) == get_data.LONGEST_PROMPT and prompt.endswith("x end?")


def test_a_page_in_place_of_the_archive_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match="no zip archive; download it with a browser and name it with --archive"):
        get_data.get_trace(tmp_path, lambda url: b"<html>", get_data.Digests(tmp_path / "digests.json"))
    assert not list(tmp_path.iterdir())


# --- trace_metrics.py -------------------------------------------------------------------------------------------------


def test_sari_is_the_one_that_its_libraries_document():
    """The example of Hugging Face's metric `sari` and of EASSE, and what both give where there is nothing to do."""
    references = ["About 95 species are currently known.", "About 95 species are now accepted."]
    references.append("95 species are now accepted.")
    score = metrics.sari_of("About 95 species are currently accepted.", "About 95 you now get in.", references)
    assert 100 * score == pytest.approx(26.953601953601954)
    assert metrics.sari("a b", {"prompt": "a b", "answer": "a b"}) == 1
    assert metrics.sari_of("a", "", ["a"]) == pytest.approx(2.5 / 3)


def test_rouge_l_is_that_of_its_paper():
    """Lin, 2004, section 3.1: «police killed the gunman» and two candidates."""
    record = {"answer": "police killed the gunman"}
    assert metrics.rouge_l("police kill the gunman", record) == 0.75
    assert metrics.rouge_l("the gunman kill police", record) == 0.5
    assert metrics.rouge_l("", record) == 0


def test_edit_similarity_is_that_of_fuzzywuzzy_and_reads_literals():
    """97 is the first example of fuzzywuzzy's README."""
    assert round(100 * metrics.edit_similarity("this is a test", {"answer": "this is a test!"})) == 97
    assert metrics.edit_similarity("x = 2 + ab", {"answer": "x = <NUM_LIT:2> + <STR_LIT:ab>"}) == 1
    assert metrics.edit_similarity("x = 0", {"answer": "x = <NUM_LIT>"}) == 1


def test_the_first_letter_decides_in_scienceqa():
    record = {"answer": "B\nBecause of this."}
    assert metrics.first_letter(" B\nFor another reason", record) is True
    assert metrics.first_letter("A\nBecause of this.", record) is False
    assert metrics.first_letter("", record) is False
