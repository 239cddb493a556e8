"""The text of every kind of value, whether read from JSON, Parquet or a dataset; what has none is refused by its name.

The reference for values that are right already is what pyarrow, pandas and datasets give.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from loraf.errors import ConfigError
from loraf_train.data.forms.form import RecordFault
from loraf_train.data.forms.text import field_text
from loraf_train.data.records import read
from loraf_train.data.task_data import load_task
from loraf_train.data.values import Label, Unreadable
from loraf_train.settings.data import EvaluationSource, RecordSource
from tests.loraf_train.data.test_examples import problems_of, task, texts, write_jsonl
from tests.standins import byte_tokenizer

AS_IT_IS = {"prompt": "{v}", "completion": "{c}"}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def parquet(folder: Path, arrays: list[pyarrow.Array], names: list[str]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), folder / "rows.parquet")
    return folder / "rows.parquet"


def prompts(folder: Path, file: Path, tokenizer, **data) -> list[str]:
    return [
        prompt.removeprefix("<s>")
        for prompt, _ in texts(load_task(task(folder, [file], **data), tokenizer, 0), tokenizer)
    ]


def saved(folder: Path, rows: dict[str, list], features: dict) -> RecordSource:
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(folder / "saved")
    return RecordSource(dataset=str(folder / "saved"))


# --- one value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is ü 😀", "as it is ü 😀"),
        ("", ""),
        (b"bytes \xc3\xbc", "bytes ü"),
        (0, "0"),
        (42, "42"),
        (10**30, "1" + 30 * "0"),
        (0.5, "0.5"),
        (1.0, "1.0"),
        (True, "true"),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("1E-8"), "0.00000001"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (pandas.Timestamp("2024-02-29 12:00"), "2024-02-29 12:00:00"),
        (Label(1, "pos"), "pos"),
        (numpy.float64(0.5), "0.5"),
        (numpy.int64(7), "7"),
        (numpy.str_("s"), "s"),
        (numpy.array([1, 2]), "[1, 2]"),
        ([], "[]"),
        ({"a": 1, "b": None, "c": True}, '{"a": 1, "b": null, "c": true}'),
        ([{"x": b"\xc3\xbc"}, Label(0, "neg"), decimal.Decimal("2.0")], '[{"x": "ü"}, "neg", "2.0"]'),
        ({1: datetime.date(2024, 1, 1)}, '{"1": "2024-01-01"}'),
    ],
)
def test_the_text_of_a_value(value, text):
    assert field_text(value, "f") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "null in field 'f'"),
        (math.nan, "NaN in field 'f'"),
        (-math.inf, "-inf in field 'f'"),
        (decimal.Decimal("NaN"), "NaN in field 'f'"),
        ({"a": [1, math.nan]}, "NaN in field 'f[a][1]'"),
        (b"\xff", "bytes in field 'f' that are not UTF-8"),
        ({"bytes": b"\x89PNG\xff"}, "field 'f[bytes]'"),
        ("half \ud83d", "field 'f' has a lone surrogate (U+D83D)"),
        (["\udc00"], "field 'f[0]' has a lone surrogate (U+DC00)"),
        (Label(-1, None), "label -1 in field 'f'"),
        (Unreadable("occurs twice", "keep one"), "field 'f' occurs twice"),
        ({"k": Unreadable("occurs twice", "keep one")}, "field 'f[k]' occurs twice"),
        (object(), "type object in field 'f'"),
    ],
)
def test_a_value_without_a_text_is_refused_by_its_field(value, message):
    with pytest.raises(RecordFault) as caught:
        field_text(value, "f")
    assert message in caught.value.message
    assert caught.value.remedy


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [(0, "0"), (0.5, "0.5"), (False, "false"), ({"a": None}, '{"a": null}'), (["a"], '["a"]'), (None, ""), ("", "")],
)
def test_the_input_of_an_instruction_is_any_value(tmp_path, tokenizer, given, text):
    rows = [{"instruction": "Do.", "input": given, "output": 0}]
    ((prompt, completion),) = texts(load_task(task(tmp_path, rows), tokenizer, 0), tokenizer)
    between = f"\n\n{text}" if text else ""
    assert f"### Instruction:\nDo.{between}\n\n### Response:" in prompt
    assert completion == "0</s>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": None, "input": "x", "output": "y"}, "has null in field 'instruction'"),
        ({"instruction": "a", "input": math.nan, "output": "y"}, "has NaN in field 'input'"),
        ({"instruction": "a", "output": None}, "has null in field 'output'"),
        ({"instruction": math.inf, "input": "x", "output": "y"}, "has inf in field 'instruction'"),
        ({"prompt": {"role": "user", "content": "x"}, "completion": "y"}, "a message in field 'prompt' that is not in"),
        ({"prompt": [{"from": "human", "value": "x"}], "completion": "y"}, "the keys from and value"),
        ({"prompt": "x", "completion": "\ud83d"}, "field 'completion' has a lone surrogate"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud83d"}]},
            "lone surrogate",
        ),
    ],
)
def test_a_field_that_cannot_be_meant_is_refused(tmp_path, tokenizer, row, message):
    ((field, reported, remedy),) = problems_of(task(tmp_path, [row]), tokenizer)
    assert field == "record 1" and message in reported and remedy


def test_lists_of_messages_in_prompt_and_completion_are_a_conversation(tmp_path, tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
        for i in range(2)
    ]
    chat = [{"messages": [*row["prompt"], *row["completion"]]} for row in rows]
    expected = load_task(task(tmp_path, chat), tokenizer, 0)
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    assert (data.train, data.templates) == (expected.train, expected.templates)
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert load_task(task(tmp_path, [tmp_path / "rows.parquet"]), tokenizer, 0).train == expected.train
    # Explicit templates are followed, with a warning.
    data = load_task(task(tmp_path, rows, prompt="{prompt}:", completion="{completion}"), tokenizer, 0)
    assert texts(data, tokenizer)[0][0] == '<s>[{"role": "user", "content": "q0"}]:'
    assert ["messages, which the template of the task writes as JSON" in w.message for w in data.warnings] == [True] * 2


def test_lists_that_are_not_messages_are_json(tmp_path, tokenizer):
    rows = [{"prompt": "who?", "completion": value} for value in (["Ann"], [], [{"name": "Ann", "role": "user"}])]
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    assert [json.loads(c.removesuffix("</s>")) for _, c in texts(data, tokenizer)] == [r["completion"] for r in rows]


def test_a_file_that_mixes_forms_is_refused_by_record(tmp_path, tokenizer):
    text = {"prompt": "p", "completion": "c"}
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    for rows in (
        [text, chat],
        [chat, text],
        [text, {"messages": chat["prompt"]}],
        [{"messages": chat["prompt"] + chat["completion"]}, text],
    ):
        ((field, _, remedy),) = problems_of(task(tmp_path, rows), tokenizer)
        assert field == "record 2" and remedy


def test_null_fields_do_not_choose_the_form(tmp_path, tokenizer):
    """As in Parquet files that hold several kinds of records."""
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for full in ({"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"}, chat):
        rest = {"messages": None, "prompt": None, "completion": None, "instruction": None, "output": None}
        expected = load_task(task(tmp_path, [full]), tokenizer, 0)
        assert load_task(task(tmp_path, [rest | full]), tokenizer, 0).train == expected.train


def test_empty_completions_are_warned_of(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": c} for c in ("x", "", " \n")]
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    (warning,) = data.warnings
    assert warning.field == "record 2" and "empty in 2 of 3 records" in warning.message
    assert texts(data, tokenizer)[1] == ("<s>p", "</s>")


# --- Parquet and datasets --------------------------------------------------------------------------------------------


def test_values_of_parquet(tmp_path, tokenizer):
    """Of each type: the text in a template. Values and types beside them are those of pyarrow."""
    instant = datetime.datetime(2024, 2, 29, 12)
    small, half = pyarrow.float32(), pyarrow.float16()
    struct = pyarrow.struct({"a": small, "b": pyarrow.list_(half)})
    columns = {
        "binary": (pyarrow.array(["ü".encode()]), "ü"),
        "float32": (pyarrow.array([0.1], small), "0.1"),
        "float16": (pyarrow.array([0.1], half), "0.1"),
        "float64": (pyarrow.array([0.1]), "0.1"),
        "floats": (pyarrow.array([[0.1, None]], pyarrow.list_(small)), "[0.1, null]"),
        "struct": (pyarrow.array([{"a": 0.1, "b": [0.7]}], struct), '{"a": 0.1, "b": [0.7]}'),
        "map": (pyarrow.array([[("k", 0.1)]], pyarrow.map_(pyarrow.string(), small)), '{"k": 0.1}'),
        "decimal": (pyarrow.array([decimal.Decimal("1.50")]), "1.50"),
        "date": (pyarrow.array([datetime.date(2024, 2, 29)]), "2024-02-29"),
        "time": (pyarrow.array([instant], pyarrow.timestamp("ns")), "2024-02-29 12:00:00"),
        "category": (pyarrow.array(["x"]).dictionary_encode(), "x"),
        "uint64": (pyarrow.array([2**64 - 1], pyarrow.uint64()), "18446744073709551615"),
        "json": (pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['"text"'])), "text"),
        "long": (pyarrow.array(["x"], pyarrow.large_string()), "x"),
    }
    file = parquet(tmp_path, [array for array, _ in columns.values()], list(columns))
    for name, (_, text) in columns.items():
        assert prompts(tmp_path, file, tokenizer, prompt=f"{{{name}}}", completion="{category}") == [text], name


def test_columns_that_cannot_be_read_stop_only_what_uses_them(tmp_path, tokenizer):
    bad_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    faulty = {
        "date": pyarrow.array([0, 10**8], pyarrow.int32()).cast(pyarrow.date32()),
        "zone": pyarrow.array([1, 2], pyarrow.timestamp("us", "Nowhere/Nothing")),
        "text": bad_text,
        "map": pyarrow.array([[("a", 1)], [("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "twice": pyarrow.array(["a", "b"]),
    }
    names = ["prompt", "completion", *faulty, "twice"]
    texts_ = pyarrow.array(["a", "b"])
    file = parquet(tmp_path, [texts_, texts_, *faulty.values(), texts_], names)
    assert prompts(tmp_path, file, tokenizer) == ["a", "b"]
    for name in faulty:
        ((field, message, remedy),) = problems_of(task(tmp_path, [file], prompt=f"{{{name}}}"), tokenizer)
        assert field == ("record 1" if name in ("zone", "twice") else "record 2")
        assert f"field {name!r}" in message and remedy
    assert read(RecordSource(file=file))[0]["date"] == datetime.date(1970, 1, 1)


def test_a_damaged_column_stops_only_what_uses_it(tmp_path, tokenizer):
    texts_ = pyarrow.array(["a", "b"])
    table = pyarrow.table({"prompt": texts_, "completion": texts_, "note": texts_})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(tmp_path / "rows.parquet").metadata.row_group(0).column(2)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    (tmp_path / "rows.parquet").write_bytes(content)
    assert prompts(tmp_path, tmp_path / "rows.parquet", tokenizer) == ["a", "b"]
    ((field, message, _),) = problems_of(task(tmp_path, [tmp_path / "rows.parquet"], prompt="{note}"), tokenizer)
    assert field == "record 1" and "field 'note' cannot be read" in message


def test_class_labels_are_their_names(tmp_path, tokenizer):
    names = ["neg", "pos"]
    features = {
        "c": datasets.Value("string"),
        "v": datasets.ClassLabel(names=names),
        "many": datasets.List(datasets.ClassLabel(names=names)),
        "deep": {"v": datasets.ClassLabel(names=names)},
    }
    rows = {"c": ["a", "b"], "v": [1, 0], "many": [[0, 1], []], "deep": [{"v": 0}, {"v": 1}]}
    source = saved(tmp_path, rows, features)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "rows.parquet")
    for origin in (source, RecordSource(file=tmp_path / "rows.parquet")):
        settings = task(tmp_path, [tmp_path / "rows.parquet"], prompt="{v} {many} {deep[v]} {v:d}", completion="{v}")
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"train": (origin,)})})
        found = texts(load_task(settings, tokenizer, 0), tokenizer)
        assert found == [('<s>pos ["neg", "pos"] neg 1', "pos</s>"), ("<s>neg [] pos 0", "neg</s>")]
        assert read(origin) == [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def test_choices_are_the_names_of_class_labels(tmp_path, tokenizer):
    features = {"q": datasets.Value("string"), "answer": datasets.ClassLabel(names=["neg", "pos"])}
    source = saved(tmp_path, {"q": ["a", "b"], "answer": [1, 0]}, features)
    evaluation = EvaluationSource(dataset=source.dataset, choices=("pos", "neg"))
    settings = task(
        tmp_path, [{"q": "x", "answer": "neg"}], "choice", eval={"e": evaluation}, prompt="{q}", completion="{answer}"
    )
    examples = load_task(settings, tokenizer, 0).evaluation["e"].examples
    assert [e.expected for e in examples] == ["pos", "neg"]


def test_a_missing_class_label_is_refused(tmp_path, tokenizer):
    source = saved(tmp_path, {"v": [0, -1]}, {"v": datasets.ClassLabel(names=["neg"])})
    settings = task(tmp_path, [{"v": "neg"}], prompt="{v}", completion="{v}", eval={"e": {"dataset": source.dataset}})
    ((field, message, _),) = problems_of(settings, tokenizer)
    assert field == "record 2" and "label -1 in field 'v'" in message


def test_unused_values_of_a_dataset_that_cannot_be_read_do_not_stop_it(tmp_path):
    table = pyarrow.table({"prompt": ["a"], "day": pyarrow.array([10**8], pyarrow.int32()).cast(pyarrow.date32())})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    (record,) = read(RecordSource(dataset=str(tmp_path / "saved")))
    assert record["prompt"] == "a" and "cannot be read" in record["day"].reason


def test_whole_numbers_that_pandas_stored_with_a_point_are_not_learned_so_unnoticed(tmp_path, tokenizer):
    rows = pandas.DataFrame({"instruction": ["a", "b"], "input": [3, None], "output": ["x", "y"]})
    rows.to_parquet(tmp_path / "rows.parquet")  # 3 is 3.0 there
    ((field, message, remedy),) = problems_of(task(tmp_path, [tmp_path / "rows.parquet"]), tokenizer)
    assert field == "record 1" and "pandas stores 3 so" in message and "Int64" in remedy
    rows.astype({"input": "Int64"}).to_parquet(tmp_path / "rows.parquet")
    data = load_task(task(tmp_path, [tmp_path / "rows.parquet"]), tokenizer, 0)
    assert "a\n\n3\n\n" in texts(data, tokenizer)[0][0] and data.warnings == ()
    rows.dropna().to_parquet(tmp_path / "rows.parquet")
    data = load_task(task(tmp_path, [tmp_path / "rows.parquet"]), tokenizer, 0)
    assert [("3.0" in w.message, "{input:.0f}" in w.remedy) for w in data.warnings] == [(True, True)]
    for name, write in {"csv": rows.to_csv, "json": rows.to_json}.items():  # where a file says 3.0, it may mean it
        write(tmp_path / f"rows.{name}", **({"index": False} if name == "csv" else {"orient": "records"}))
        (warning,) = load_task(task(tmp_path, [tmp_path / f"rows.{name}"]), tokenizer, 0).warnings
        assert "3.0" in warning.message and "Int64" in warning.remedy
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"v": 3.0, "c": "x"}, {"v": 3.5, "c": "y"}])
    assert load_task(task(tmp_path, [mixed], **AS_IT_IS), tokenizer, 0).warnings == ()


def test_keys_that_a_table_adds_to_mappings_are_warned_of(tmp_path, tokenizer):
    rows = [{"prompt": "call", "completion": {"city": "Rome"}}, {"prompt": "call", "completion": {"name": "Ann"}}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    data = load_task(task(tmp_path, [tmp_path / "rows.parquet"]), tokenizer, 0)
    (warning,) = data.warnings
    assert warning.field == "record 1" and "field 'completion' has keys without a value" in warning.message
    assert texts(data, tokenizer)[0] == ("<s>call", '{"city": "Rome", "name": null}</s>')
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    assert texts(data, tokenizer)[0] == ("<s>call", '{"city": "Rome"}</s>') and data.warnings == ()


def test_a_metric_of_the_user_that_looks_at_an_unreadable_value_is_told_so(tmp_path, tokenizer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": "c", "n": 1, "n": 2}\n')
    settings = task(tmp_path, [rows], eval={"e": str(rows)})
    looks = settings.model_copy(update={"metric": "m.grade", "grade": lambda answer, record: record.get("n") == 2})
    ((field, message, _),) = problems_of(looks, tokenizer)
    assert field == "record 2" and "occurs twice" in message
    blind = settings.model_copy(update={"metric": "m.grade", "grade": lambda answer, record: True})
    assert len(load_task(blind, tokenizer, 0).train) == 2


def test_general_text_with_a_lone_surrogate_is_refused(tmp_path, tokenizer):
    from loraf_train.compare.general import general_text

    file = write_jsonl(tmp_path / "general.jsonl", [{"text": "good text"}, {"text": "half \ud83d"}])
    with pytest.raises(ConfigError, match="record 2: field 'text' has a lone surrogate"):
        general_text(RecordSource(file=file), tokenizer, 64)


@pytest.mark.parametrize("written", [json.dumps, str], ids=["JSON", "as pandas writes it to CSV"])
def test_messages_that_are_one_text_are_not_learned_as_it(tmp_path, tokenizer, written):
    question, answer = [{"role": "user", "content": "hi"}], [{"content": "ho", "role": "assistant"}]
    for name, row in {
        "prompt": {"prompt": written(question), "completion": written(answer)},
        "completion": {"prompt": "hi", "completion": written(answer)},
        "messages": {"messages": written(question + answer)},
    }.items():
        ((field, message, remedy),) = problems_of(task(tmp_path, [row]), tokenizer)
        assert field == "record 1" and "as one text" in message and name in message
        assert "JSON lines or Parquet" in remedy
    row = {"prompt": written(question), "completion": "ho"}  # templates say that the text is meant
    data = load_task(task(tmp_path, [row], prompt="{prompt}", completion="{completion}"), tokenizer, 0)
    assert texts(data, tokenizer) == [(f"<s>{written(question)}", "ho</s>")]


@pytest.mark.parametrize("value", ['[{"role": "x"}]', "[1, 2]", 'see [{"role": "user", "content": "hi"}]', "[]"])
def test_text_that_is_not_a_list_of_messages_is_learned_as_it_is(tmp_path, tokenizer, value):
    data = load_task(task(tmp_path, [{"prompt": value, "completion": value}]), tokenizer, 0)
    assert texts(data, tokenizer) == [(f"<s>{value}", f"{value}</s>")]


def test_fields_that_other_trainers_read_are_warned_of_where_no_form_writes_them(tmp_path, tokenizer):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    alpaca = {"instruction": "Add.", "output": "3", "history": []}
    for rows, field in [
        ([chat | {"system": ""}, chat | {"system": "Be brief."}], "system"),  # as of Anthropic's files
        ([alpaca, alpaca | {"history": [["a", "b"]]}], "history"),  # as of LLaMA-Factory's
    ]:
        (warning,) = load_task(task(tmp_path, rows), tokenizer, 0).warnings
        assert warning.field == "record 2" and f"field {field!r}, which is not a part" in warning.message
    row = {"system": "Be brief.", "v": "a", "c": "b"}  # the task's own templates choose
    assert load_task(task(tmp_path, [row], **AS_IT_IS), tokenizer, 0).warnings == ()


def test_a_conversation_under_another_name_is_told_how_to_write_it(tmp_path, tokenizer):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    ((_, message, remedy),) = problems_of(task(tmp_path, [row]), tokenizer)
    assert "conversation in field 'conversations'" in message and "human is user" in remedy


def test_an_empty_answer_of_a_conversation_is_warned_of(tmp_path, tokenizer):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}
    (warning,) = load_task(task(tmp_path, [chat]), tokenizer, 0).warnings
    assert "empty in 1 of 1 records" in warning.message
