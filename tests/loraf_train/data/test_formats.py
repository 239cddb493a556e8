"""Every file format with every form of records, several sources for one task, and Hugging Face datasets."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas
import pytest
import yaml

from loraf.errors import ConfigError
from loraf_train.data.records import read
from loraf_train.data.task_data import load_task
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, RecordSource
from loraf_train.settings.loading import load
from tests.loraf_train.data.test_examples import texts, write_jsonl
from tests.standins import byte_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho, «ü»"}]
RECORDS = {
    "prompt and completion": {"prompt": "p, {x}\n", "completion": "c"},
    "messages": {"messages": CHAT},
    "instruction": {"instruction": "Add.", "input": "1, 2", "output": "3"},
    "templates": {"question": 'q\n"q"', "answer": "007"},
}
TEMPLATES = {"templates": {"prompt": "{question}: ", "completion": "{answer}"}}


def _csv(rows, path, separator=","):
    pandas.DataFrame(rows).to_csv(path, index=False, sep=separator)


WRITERS = {
    "rows.jsonl": lambda rows, path: write_jsonl(path, rows),
    "rows.ndjson": lambda rows, path: write_jsonl(path, rows),
    "rows.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "rows.csv": _csv,
    "rows.tsv": lambda rows, path: _csv(rows, path, "\t"),
    "rows.parquet": lambda rows, path: pandas.DataFrame(rows).to_parquet(path),
    "saved": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(path),
    "folder": lambda rows, path: (path.mkdir(), write_jsonl(path / "train.jsonl", rows)),
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for place in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(place, True)


def task_from_file(folder: Path, data: dict) -> TaskConfig:
    """The task as loaded from a file."""
    content = {"model": "tiny", "output": "ckpt", "tasks": [{"name": "t", "data": data}]}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    return load(folder / "tasks.yaml").tasks[0]


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_holds_every_form_of_records(tmp_path, name, form):
    tokenizer = byte_tokenizer()
    rows = [RECORDS[form], RECORDS[form]]
    WRITERS[name](rows, tmp_path / name)
    settings = TEMPLATES.get(form, {})
    if form == "messages" and name in ("rows.csv", "rows.tsv"):  # CSV holds no lists
        with pytest.raises(ConfigError, match="record 1: has no list of messages"):
            load_task(task_from_file(tmp_path, {"train": name}), tokenizer, 0)
        return
    evaluation = {"e": {**_source(name), **_train_split(name)}}
    data = load_task(task_from_file(tmp_path, {"train": name, "eval": evaluation, **settings}), tokenizer, 0)
    write_jsonl(tmp_path / "plain.jsonl", rows)
    expected = load_task(task_from_file(tmp_path, {"train": "plain.jsonl", **settings}), tokenizer, 0)
    assert len(texts(data, tokenizer)) == 2
    assert texts(data, tokenizer) == texts(expected, tokenizer)
    assert [e.example for e in data.evaluation["e"].examples] == expected.train


def _source(name: str) -> dict[str, str]:
    return {"file" if "." in name else "dataset": name}


def _train_split(name: str) -> dict[str, str]:
    """The split of an evaluation set is `test` by default."""
    return {} if "." in name else {"split": "train"}


def test_one_task_may_have_files_of_different_formats(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [{"prompt": f"{i}", "completion": "c"} for i in range(8)]
    for i, name in enumerate(WRITERS):
        WRITERS[name](rows[i : i + 1], tmp_path / name)
    data = load_task(task_from_file(tmp_path, {"train": list(WRITERS)}), tokenizer, 0)
    assert [prompt for prompt, _ in texts(data, tokenizer)] == [f"<s>{i}" for i in range(8)]


def test_a_dataset_with_subsets_and_splits(tmp_path):
    """As on the hub: a README.md assigns files to subsets and splits."""
    folder = tmp_path / "org" / "set"
    folder.mkdir(parents=True)
    configs = []
    for subset in ("main", "hard"):
        files = [{"split": split, "path": f"{subset}-{split}.jsonl"} for split in ("train", "validation")]
        configs.append({"config_name": subset, "data_files": files})
        for file in files:
            rows = [{"prompt": f"{subset} {file['split']} {i}", "completion": "c"} for i in range(4)]
            write_jsonl(folder / file["path"], rows)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    dataset = {"dataset": "org/set", "subset": "hard"}
    task = task_from_file(tmp_path, {"train": {**dataset}, "eval": {"e": {**dataset, "split": "validation[:50%]"}}})
    data = load_task(task, byte_tokenizer(), 0)
    assert [p for p, _ in texts(data, byte_tokenizer())] == [f"<s>hard train {i}" for i in range(4)]
    assert len(data.evaluation["e"].examples) == 2
    with pytest.raises(ConfigError, match="cannot be read .*main.*hard"):  # the subset is missing
        read(RecordSource(dataset=str(folder)))
    with pytest.raises(ConfigError, match="cannot be read .*test.* → check subset: and split:"):
        read(RecordSource(dataset=str(folder), subset="main"), "test")


def test_a_saved_dataset_has_the_splits_it_was_saved_with(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "c"} for i in range(10)]
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    parts["train"].save_to_disk(tmp_path / "one")
    folder = str(tmp_path / "saved")
    assert read(RecordSource(dataset=folder)) == rows
    assert read(RecordSource(dataset=folder), "test") == rows[:3]
    assert read(RecordSource(dataset=folder, split="train[20%:50%]")) == rows[2:5]
    assert read(RecordSource(dataset=folder, split="train[:2]+test[-1:]")) == [*rows[:2], rows[2]]
    one = RecordSource(dataset=str(tmp_path / "one"))
    assert read(one) == read(one, "test") == rows
    with pytest.raises(ConfigError, match="cannot be read .*dev.*train"):
        read(RecordSource(dataset=folder, split="dev"))
    with pytest.raises(ConfigError, match=r"the split train\[:0\] has no records"):
        read(RecordSource(dataset=folder, split="train[:0]"))


def test_a_name_of_the_hub_is_passed_on_to_the_datasets_library(tmp_path, monkeypatch):
    """A fake records the calls of `datasets.load_dataset`, since tests reach no hub."""
    calls = []

    def load_dataset(path, name=None, *, split, revision=None):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    full = {"dataset": "openai/gsm8k", "subset": "main", "split": "train[:9]", "revision": "v1"}
    task = task_from_file(tmp_path, {"train": ["org/name", full], "eval": "org/name"})
    assert len(load_task(task, byte_tokenizer(), 0).train) == 2
    assert calls == [
        ("org/name", None, "train", None),
        ("openai/gsm8k", "main", "train[:9]", "v1"),
        ("org/name", None, "test", None),
    ]
    assert str(task.data.train[1]) == "openai/gsm8k@v1:main:train[:9]"


@pytest.mark.parametrize("key", ["subset", "split", "revision"])
def test_a_file_has_no_key_of_a_dataset(tmp_path, key):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(ConfigError, match=f"data.train: a file has no {key} → leave it out"):
        task_from_file(tmp_path, {"train": {"file": "a.jsonl", key: "x"}})


def test_records_equal_those_that_the_datasets_library_reads(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "n": 1}, {"prompt": "q", "completion": "d", "n": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    theirs = datasets.load_dataset("json", data_files=str(path), split="train").to_list()
    assert read(RecordSource(file=path)) == theirs == rows
    assert DataConfig(train=str(path)).train[0].file == path
