"""Files that are not quite what their names say, and fields that occur twice: read right, or refused with a reason."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pandas
import pytest
import yaml

from loraf.errors import ConfigError
from loraf_train.data.records import read
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import RecordSource
from loraf_train.settings.loading import load
from tests.loraf_train.data.test_examples import problems_of, task, write_jsonl
from tests.standins import byte_tokenizer

ROWS = [{"prompt": "p, «ü»\nq", "completion": "1"}, {"prompt": "", "completion": "NA"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def _zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def loaded(folder: Path, **data) -> TaskConfig:
    content = {"model": "tiny", "output": "ckpt", "tasks": [{"name": "t", "data": data}]}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    return load(folder / "tasks.yaml").tasks[0]


def _contents() -> dict[str, bytes]:
    frame, parquet = pandas.DataFrame(ROWS), io.BytesIO()
    frame.to_parquet(parquet)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return {
        "jsonl": lines,
        "ndjson": lines,
        "json": json.dumps(ROWS).encode(),
        "csv": frame.to_csv(index=False).encode("utf-8-sig"),
        "tsv": frame.to_csv(index=False, sep="\t").encode(),
        "parquet": parquet.getvalue(),
    }


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_in_capitals_and_compressed(tmp_path, kind):
    content = _contents()[kind]
    (tmp_path / f"A.{kind.upper()}").write_bytes(content)
    (tmp_path / f"b.{kind}.gz").write_bytes(_zipped(content))
    (tmp_path / f"C.{kind}.GZ").write_bytes(_zipped(content))
    (tmp_path / f"unsaid.{kind}").write_bytes(_zipped(content))  # compressed, though its name does not say so
    names = [path.name for path in tmp_path.iterdir()]
    sources = loaded(tmp_path, train=names).data.train
    assert [source.file for source in sources] == [tmp_path / name for name in names]
    for source in sources:
        assert read(source) == ROWS


def test_an_evaluation_set_is_named_without_both_suffixes(tmp_path):
    for name in ("part/test.jsonl.gz", "hard.jsonl.gz", "EASY.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_zipped(b'{"prompt": "p", "completion": "c"}\n'))
    settings = loaded(tmp_path, train="hard.jsonl.gz", eval=["part/test.jsonl.gz", "hard.jsonl.gz", "EASY.JSONL"])
    assert list(settings.data.eval) == ["part", "hard", "EASY"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("notes.txt", "notes.txt is not in a known format → use one of: .jsonl,"),
        ("a.jsonl.zst", "there is no file"),
        ("none.JSONL", "there is no file"),
        ({"dataset": "there.jsonl"}, "there.jsonl is a local file → give file:"),
        ({"file": "there.jsonl.zip"}, "is not in a known format"),
    ],
)
def test_a_local_file_is_not_taken_for_a_dataset_of_the_hub(tmp_path, train, message):
    for name in ("notes.txt", "there.jsonl", "there.jsonl.zip"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, train=train)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["org/name", "org/name-v1.5", "org/some.csv.v2", "name.v2"])
def test_names_of_the_hub_stay_names(tmp_path, name):
    assert loaded(tmp_path, train=name).data.train[0].dataset == name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"\x1f\x8b", "is not a whole gzip file"),
        ("a.jsonl.gz", _zipped(b'{"prompt": 1}\n')[:-9], "is not a whole gzip file"),
        ("a.csv.gz", _zipped(b"a,b\n1,2\n")[:12] + b"\xff" * 20, "is not a whole gzip file"),
        ("a.jsonl.gz", b'{"prompt": 1}\n', "is not a whole gzip file"),
        ("a.parquet.gz", _zipped(b"PAR1 no"), "is not Parquet"),
        ("a.jsonl.gz", _zipped(b""), "has no records"),
        ("a.jsonl", b"", "has no records"),
        ("a.csv", b"", "has no records"),
        ("a.parquet", b"", "is not Parquet"),
        ("a.jsonl", '{"prompt": "ü"}\n'.encode("utf-16"), "is UTF-16 text"),
        ("a.json", '[{"prompt": "ü"}]\n'.encode("utf-16-le"), "is UTF-16 text"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "is UTF-16 text"),
        ("a.csv", "prompt,completion\nü,b\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.csv", b"prompt;completion\na;b\n", "semicolons between its columns, not commas"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", "tabs between its columns, not commas"),
        ("a.tsv", b"prompt,completion\na,b\n", "commas between its columns, not tabs"),
        ("a.jsonl", b'{"prompt": 1},\n', "is not JSON"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "is not JSON"),
        ("a.json", b'{"prompt":{"0":"a"},"completion":{"0":"b"}}', "is one object of columns"),
        ("a.jsonl", b'{"prompt": ["a", "b"], "completion": ["c", "d"]}\n', "is one object of columns"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(RecordSource(file=tmp_path / name))
    (problem,) = caught.value.problems
    assert problem.file == str(tmp_path / name) and problem.remedy
    assert message in problem.message


def test_a_quoted_name_may_hold_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('"question, in short"\n"a, b"\n')
    assert read(RecordSource(file=tmp_path / "a.csv")) == [{"question, in short": "a, b"}]


def test_what_pandas_writes_by_default_is_a_table_of_columns(tmp_path):
    pandas.DataFrame(ROWS).to_json(tmp_path / "table.json")
    with pytest.raises(ConfigError, match="is one object of columns, not of records → .* orient='records'"):
        read(RecordSource(file=tmp_path / "table.json"))
    pandas.DataFrame(ROWS, index=[9, 5, 7][: len(ROWS)]).to_json(tmp_path / "table.json")  # rows of a larger table
    with pytest.raises(ConfigError, match="is one object of columns"):
        read(RecordSource(file=tmp_path / "table.json"))
    single = [{"prompt": {"0": "a"}, "completion": {"a": "0"}}]  # a record of mappings is none
    assert read(RecordSource(file=write_jsonl(tmp_path / "a.jsonl", single))) == single


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}\n', "field 'prompt' occurs twice"),
        ("a.json", '[{"prompt": {"k": 1, "k": 1}, "completion": "b"}]', "field 'prompt[k]' occurs twice"),
        ("a.jsonl", '{"instruction": "a", "input": "", "input": "x", "output": "b"}', "field 'input' occurs twice"),
        ("a.csv", "prompt,completion,completion\na,b,c\n", "field 'completion' is the name of two columns"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "field 'messages[0][content]'"),
        ("a.jsonl", '{"messages": [], "messages": []}', "field 'messages' occurs twice"),
    ],
)
def test_a_field_that_occurs_twice_is_refused_by_name(tmp_path, tokenizer, name, content, where):
    (tmp_path / name).write_text(content)
    ((field, message, remedy),) = problems_of(task(tmp_path, [tmp_path / name]), tokenizer)
    assert field == "record 1" and where in message and remedy


def test_a_field_that_occurs_twice_and_is_not_used_is_no_mistake(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "id": 1, "id": 2}\n')
    (tmp_path / "a.csv").write_text("prompt,completion,,\na,b,,\n")  # as spreadsheets write empty columns
    for name in ("a.jsonl", "a.csv"):
        (record,) = read(RecordSource(file=tmp_path / name))
        assert (record["prompt"], record["completion"]) == ("a", "b")


def test_a_key_that_occurs_twice_does_not_decide_the_answer(tmp_path, tokenizer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completion": "it is true", "answer": "true", "answer": "false"}\n')
    evaluation = {"file": str(rows), "choices": ("true", "false")}
    ((field, message, _),) = problems_of(task(tmp_path, [rows], "choice", eval={"e": evaluation}), tokenizer)
    assert field == "record 1" and "field 'answer' occurs twice" in message


@pytest.mark.parametrize("setting", ["prompt", "completion", "choices"])
def test_settings_with_half_a_character_are_refused(tmp_path, setting):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    half = r'"\ud83d"'
    data = f"eval: {{e: {{file: a.jsonl, choices: [{half}]}}}}" if setting == "choices" else f"{setting}: {half}"
    content = f"model: tiny\noutput: ckpt\ntasks:\n- name: t\n  data: {{train: a.jsonl, {data}}}\n"
    (tmp_path / "tasks.yaml").write_text(content)
    with pytest.raises(ConfigError, match="half of a character"):
        load(tmp_path / "tasks.yaml")
