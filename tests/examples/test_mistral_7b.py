"""The paper's experiments: the example's files have the paper's settings, and run unchanged at small scale."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import config_args

from loraf import manifest as manifests
from loraf.manifest import positions_per_matrix
from loraf_train.settings.config import RunConfig
from loraf_train.settings.loading import load
from loraf_train.trainer.order import split_batch
from tests.loraf_train.command_line import run
from tests.records import PAPER_SETS, ROOT, SAMPLE, data_folder, lay_out, made_up
from tests.tools import needs

EXAMPLE = ROOT / "examples" / "mistral-7b"
# Mistral-7B: d_out of each projection, 32 layers (its config.json: hidden 4096, 8 key/value heads of 128, MLP 14336).
MISTRAL_D_OUT = (4096, 1024, 1024, 4096, 14336, 14336, 4096)
MISTRAL_LAYERS = 32
SMALL = [  # makes the paper's run one of seconds; everything else is as in the file
    *("model=tiny", "training.max_steps=2", "training.batch_size=4", "training.micro_batch_size=2"),
    *("training.max_length=384", "calibration.steps=2", "tasks.math.max_new_tokens=8", "tasks.nlu.max_new_tokens=8"),
    *("tasks.math.data.limit=16", "tasks.math.data.eval_limit=2"),
    *("tasks.nlu.data.limit=24", "tasks.nlu.data.eval_limit=2"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """The example's tasks.yaml, with records in the places that it names."""
    shutil.copy(EXAMPLE / "tasks.yaml", tmp_path)
    lay_out(tmp_path, data_folder())
    return tmp_path


def test_the_configuration_has_the_papers_settings(folder):
    config = load(folder / "tasks.yaml")
    math, nlu = config.tasks
    assert (config.model, config.adapter.rank) == ("mistralai/Mistral-7B-v0.1", 64)
    assert (math.alpha, math.training.learning_rate, math.training.epochs) == (64, 5e-4, 3)
    assert (nlu.alpha, nlu.training.learning_rate, nlu.training.epochs) == (128, 1e-4, 1)
    for task in (math, nlu):
        training = task.training
        assert (task.sparsity, task.start) == (0.9, "previous")
        assert (training.batch_size, training.dropout, training.warmup_steps) == (32, 0.05, 0)
    assert set(nlu.data.eval) == set(PAPER_SETS)
    k = MISTRAL_LAYERS * sum(positions_per_matrix(0.9, d_out, 64) for d_out in MISTRAL_D_OUT)
    assert k == 8_807_936  # «8.8M» in the paper


def test_each_compared_method_has_its_own_learning_rates_and_otherwise_the_papers_settings(folder):
    config = load(folder / "tasks.yaml")

    def rates(of: RunConfig) -> list[float]:
        return [task.training.learning_rate for task in of.tasks]

    assert len(config.compare.seeds) == 3
    assert rates(config.of_method("loraf")) == rates(config) == [5e-4, 1e-4]
    others = {name: config.of_method(name) for name in ("lora", "full")}
    assert len({*rates(config), *rates(others["lora"]), *rates(others["full"])}) == 5
    for method in others.values():
        assert [task.training.epochs for task in method.tasks] == [3, 1]
        assert {task.training.batch_size for task in method.tasks} == {32}
    assert [task.alpha for task in others["lora"].tasks] == [64, 128] and others["lora"].adapter.rank == 64


def test_eight_processes_take_one_micro_batch_each(folder):
    """Checked with accelerate's own reader of the file."""
    file = EXAMPLE / "accelerate.yaml"
    launch = config_args.load_config_from_file(str(file))
    assert launch.to_dict() | yaml.safe_load(file.read_text()) == launch.to_dict()  # no unknown key
    assert (launch.num_processes, str(launch.distributed_type), launch.num_machines) == (8, "MULTI_GPU", 1)
    training = load(folder / "tasks.yaml").tasks[0].training
    assert split_batch(training.batch_size, training.micro_batch_size, launch.num_processes) == (4, 1)
    assert split_batch(training.batch_size, training.micro_batch_size, 1) == (4, 8)


@pytest.mark.parametrize("source", ["local", "handful"])
@pytest.mark.slow
def test_the_same_file_runs_at_small_scale(source, tmp_path, capsys):
    records = data_folder() if source == "local" else SAMPLE
    if source == "local" and records == SAMPLE:
        pytest.skip(needs("real records"))
    shutil.copy(EXAMPLE / "tasks.yaml", tmp_path)
    lay_out(tmp_path, records)
    file = str(tmp_path / "tasks.yaml")
    changes = [argument for change in SMALL for argument in ("--set", change)]
    status, out, err = run(capsys, "check", file, *changes)
    assert status == 0, err
    status, out, err = run(capsys, "run", file, *changes, "--no-eval")
    assert status == 0, err
    manifest = manifests.read(tmp_path / "ckpt")
    assert [(t.name, t.alpha, t.sparsity, t.training["steps"]) for t in manifest.tasks] == [
        ("math", 64, 0.9, 2),
        ("nlu", 128, 0.9, 2),
    ]
    assert str(manifest.as_trained("nlu")) == "math+nlu"
    scores = tmp_path / "scores.json"
    status, out, err = run(capsys, "eval", file, *changes, "--as-trained", "nlu", "--base", "--json", str(scores))
    assert status == 0, err
    by_place = {(s["set"], s["task"], s["evaluation"]): s for s in json.loads(scores.read_text())["scores"]}
    for task_set in ("base", "math+nlu"):
        assert by_place[task_set, "math", "gsm8k"]["metric"] == "gsm8k"
        sets = [name for of, task, name in by_place if (of, task) == (task_set, "nlu")]
        assert sets == [*PAPER_SETS, "mean"]
        mean = sum(by_place[task_set, "nlu", name]["score"] for name in PAPER_SETS) / len(PAPER_SETS)
        assert by_place[task_set, "nlu", "mean"]["score"] == pytest.approx(mean)
        assert all(by_place[task_set, "nlu", name]["count"] == 2 for name in PAPER_SETS)


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("single", (*PAPER_SETS, "gsm8k", "mean")), ("sequence", ("math", "nlu", "forgetting", "as-trained", "drift"))],
)
@pytest.mark.slow
def test_table_1_and_figure_2_are_made_at_small_scale(protocol, expected, tmp_path, capsys):
    shutil.copy(EXAMPLE / "tasks.yaml", tmp_path)
    lay_out(tmp_path, SAMPLE)
    (tmp_path / "general.jsonl").write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n')
    changes = [argument for change in (*SMALL, "compare.general=general.jsonl") for argument in ("--set", change)]
    options = ("--protocol", protocol, "--methods", "loraf,lora,full", "--seeds", "0")
    status, out, err = run(capsys, "compare", str(tmp_path / "tasks.yaml"), *changes, *options)
    assert status == 0, err
    written = tmp_path / "ckpt-compare" / protocol
    results = json.loads((written / "results.json").read_text())
    assert [of_run["method"] for of_run in results["runs"]] == ["loraf", "lora", "full"]
    assert all((of_run["seed"], len(of_run["costs"])) == (0, 2) for of_run in results["runs"])
    report = (written / "report.md").read_text().lower()
    assert [text for text in expected if text not in report] == []
    assert {file.suffix for file in written.iterdir()} >= {".png", ".svg"}


# --- get_data.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def get_data():
    spec = importlib.util.spec_from_file_location("get_data", EXAMPLE / "get_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JOINT_COUNTS = {"piqa": 5, "social_i_qa": 7}


def upstream(get_data, urls: list[str]) -> Callable[[str], bytes]:
    """Stands in for the two upstream repositories, with the committed handful and a joint file in the form of theirs.

    The URLs of all requests are added to `urls`.
    """
    folders = {there: here for here, there in get_data.ORIGINS.items()}
    three_answers = {
        "instruction": "Which?\n\nAnswer format: answer1/answer2/answer3",
        "input": "",
        "output": "answer1",
    }

    def records(name: str, part: str) -> list[dict]:
        file = SAMPLE / "nlu" / name / part
        content = json.loads(file.read_text()) if file.exists() else made_up(name, 4)
        return [*content, three_answers] if (name, part) == ("arc_easy", "train.json") else content

    def fetch(url: str) -> bytes:
        urls.append(url)
        if url == get_data.JOINT:
            # All sets are in one list; ARC's question with three answers looks like one of SIQA.
            others = [record for name in ("boolq", "arc_easy", "openbookqa") for record in records(name, "train.json")]
            mixed = [*made_up("social_i_qa", 7), *others, *made_up("piqa", 5)]
            return json.dumps(mixed).encode()
        base, _, part = url.rpartition("/")
        if base == get_data.GSM8K:
            return (SAMPLE / "gsm8k" / part).read_bytes()
        assert base.startswith(f"{get_data.ADAPTERS}/dataset/")
        return json.dumps(records(folders[base.rpartition("/")[2]], part)).encode()

    return fetch


def counts(get_data) -> dict[str, int]:
    expected = {}
    for name in get_data.COUNTS:
        file = SAMPLE / name
        of_set = Path(name).parent.name
        if get_data.from_joint(name):
            expected[name] = JOINT_COUNTS[of_set]
        elif not file.exists():
            expected[name] = 4
        else:
            text = file.read_text()
            expected[name] = len(text.splitlines()) if file.suffix == ".jsonl" else len(json.loads(text))
    expected["nlu/arc_easy/train.json"] += 1
    return expected


def test_data_sets_are_downloaded_split_and_counted_and_existing_files_kept(get_data, tmp_path):
    urls: list[str] = []
    fetch, expected = upstream(get_data, urls), counts(get_data)
    get_data.get(tmp_path / "data", fetch, expected, {})
    assert len(urls) == len(get_data.COUNTS) - 2 + 1
    siqa = json.loads((tmp_path / "data/nlu/social_i_qa/train.json").read_text())
    assert siqa == made_up("social_i_qa", 7)
    assert json.loads((tmp_path / "data/nlu/piqa/train.json").read_text()) == made_up("piqa", 5)
    shutil.copy(EXAMPLE / "tasks.yaml", tmp_path)
    load(tmp_path / "tasks.yaml")  # every file is where it says
    (tmp_path / "data/gsm8k/test.jsonl").unlink()
    get_data.get(tmp_path / "data", fetch, expected, {})
    assert urls[-1] == f"{get_data.GSM8K}/test.jsonl" and len(urls) == len(get_data.COUNTS)


def test_an_unexpected_number_of_records_is_refused(get_data, tmp_path):
    expected = counts(get_data) | {"nlu/social_i_qa/train.json": 8}
    with pytest.raises(ValueError, match="social_i_qa/train.json would have 7 records, not 8"):
        get_data.get(tmp_path, upstream(get_data, []), expected, {})
    assert not list((tmp_path / "nlu/social_i_qa").glob("train*"))


def test_a_file_with_other_bytes_is_refused_and_every_url_names_a_commit(get_data, tmp_path):
    urls: list[str] = []
    expected = counts(get_data)
    with pytest.raises(ValueError, match=r"gsm8k/train.jsonl: the download has SHA-256 .*, not 17f347dc"):
        get_data.get(tmp_path, upstream(get_data, urls), expected)
    assert not list(tmp_path.iterdir())
    get_data.get(tmp_path, upstream(get_data, urls), expected, {})
    assert [url for url in urls if not re.search(r"/[0-9a-f]{40}/", url)] == []


def test_the_counts_are_those_of_the_local_files(get_data):
    whole = data_folder()
    if whole == SAMPLE:
        pytest.skip(needs("real records"))
    present = [name for name in get_data.COUNTS if (whole / name).is_file()]
    for name in present:
        text = (whole / name).read_text()
        count = len(text.splitlines()) if name.endswith("l") else len(json.loads(text))
        assert count == get_data.COUNTS[name], name
        if name in get_data.DIGESTS:
            assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == get_data.DIGESTS[name], name
    assert len(present) >= 12
