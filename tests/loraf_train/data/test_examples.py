"""From records to token ids: every file format and form, one BOS, a learned end, and mistakes that name the record."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from loraf.errors import ConfigError
from loraf.manifest import Templates
from loraf_train.data.forms.forms import INSTRUCTION_PROMPT
from loraf_train.data.records import read
from loraf_train.data.task_data import TaskData, load_all, load_task
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from loraf_train.settings.parts import AdapterConfig, TrainingConfig
from tests.standins import byte_tokenizer

RECORDS = Path(__file__).parents[2] / "fixtures" / "records"
ROWS = [
    {"question": "1+1?", "answer": "two", "note": 'a "quoted", text\nof two lines'},
    {"question": "{x} ünï 漢", "answer": "<s> no </s>", "note": ""},
    {"question": " spaced ", "answer": "007", "note": "NA"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(folder: Path, train, metric="exact_match", max_length=512, **data) -> TaskConfig:
    """A task as `load` would resolve it; `train`: rows, or names of files."""
    if train and isinstance(train[0], dict):
        train = [write_jsonl(folder / "train.jsonl", train)]
    sources = tuple(RecordSource(file=path) for path in train)
    return TaskConfig(
        name="t",
        alpha=1.0,
        sparsity=0.5,
        metric=metric,
        data=DataConfig(train=sources, **data),
        training=TrainingConfig(max_length=max_length),
    )


def problems_of(settings: TaskConfig, tokenizer) -> list[tuple[str, str, str]]:
    """(field, message, remedy) of each."""
    with pytest.raises(ConfigError) as caught:
        load_task(settings, tokenizer, 0)
    return [(p.field, p.message, p.remedy) for p in caught.value.problems]


def texts(data: TaskData, tokenizer) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(e.input_ids[: e.prompt_length]), tokenizer.decode(e.input_ids[e.prompt_length :]))
        for e in data.train
    ]


# --- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_records(tmp_path):
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_csv(tmp_path / "r.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "r.ndjson", orient="records", lines=True)
    frame.to_json(tmp_path / "list.json", orient="records")
    frame.to_json(tmp_path / "lines.json", orient="records", lines=True)
    (tmp_path / "indented.json").write_text("\n" + json.dumps(ROWS, indent=4))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "r.csv").read_bytes())
    for file in tmp_path.iterdir():
        assert read(RecordSource(file=file)) == ROWS, file.name


def test_a_folder_of_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set/train.jsonl", ROWS)
    write_jsonl(tmp_path / "set/test.jsonl", ROWS[:1])
    assert read(RecordSource(dataset=str(tmp_path / "set"))) == ROWS
    assert read(RecordSource(dataset=str(tmp_path / "set")), "test") == ROWS[:1]
    assert read(RecordSource(dataset=str(tmp_path / "set"), split="train[1:]")) == ROWS[1:]


def test_a_dataset_that_cannot_be_downloaded_is_reported(monkeypatch):
    for place in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(place, True)
    with pytest.raises(ConfigError) as caught:
        read(RecordSource(dataset="someone/nothing", subset="main"))
    (problem,) = caught.value.problems
    assert problem.file == "someone/nothing:main"
    assert "could not be downloaded from the hub" in problem.message
    assert "local file" in problem.remedy


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n\n[1]\n', "line 2", "is not JSON"),
        ("a.jsonl", '{"a": 1}\n\n"x"\n', "line 3", "is a string, not an object"),
        ("a.jsonl", "\n\n", "", "has no records"),
        ("a.json", "[1, 2", "", "is not JSON"),
        ("a.json", "[]", "", "has no records"),
        ("a.json", '{"data":\n []}', "", "is an object, not a list"),
        ("a.json", '[{"a": 1}, null]', "record 2", "is null, not an object"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3", "2 columns"),
        ("a.csv", "a,b\n1\n", "line 2", "2 columns"),
        ("a.csv", 'a,b\n"1,2\n', "line 2", "is not CSV"),
        ("a.csv", "a,b\n", "", "has no records"),
        ("a.parquet", "PAR1 no", "", "is not Parquet"),
        ("a.jsonl", b'{"a": "\xff"}\n', "", "is not UTF-8"),
        ("a.json", b'[{"a": "\xff"}]\n', "", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, name, content, where, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read(RecordSource(file=file))
    problem = caught.value.problems[0]
    assert (problem.file, problem.field) == (str(file), where)
    assert message in problem.message
    assert problem.remedy


def test_mistakes_in_many_records_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("x\n" * 4 + "[]\n" + "1\n" * 2 + '""\n' * 3 + "null\n")
    with pytest.raises(ConfigError) as caught:
        read(RecordSource(file=file))
    problems = caught.value.problems
    assert [p.field for p in problems] == ["line 1", "line 5", "line 6", ""]
    assert problems[0].message.endswith("(and 3 more like it)")
    assert problems[1].message == "is a list, not an object"
    assert problems[2].message == "is a number, not an object (and 1 more like it)"
    assert problems[3].message == "4 more records have mistakes"


# --- forms -----------------------------------------------------------------------------------------------------------


def test_templates_format_every_record(tmp_path, tokenizer):
    data = load_task(task(tmp_path, ROWS, prompt="Q: {question}\nA: ", completion="{answer}!"), tokenizer, 0)
    # The tokenizer reads «<s> no </s>» in a record as its special tokens; the end is still learned.
    assert texts(data, tokenizer) == [(f"<s>Q: {r['question']}\nA: ", f"{r['answer']}!</s>") for r in ROWS]
    assert data.templates == Templates("Q: {question}\nA: ", "{answer}!")


def test_one_template_leaves_the_other_at_its_default(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": "c"}]
    assert texts(load_task(task(tmp_path, rows, prompt="<{prompt}>"), tokenizer, 0), tokenizer) == [("<s><p>", "c</s>")]


def test_values_other_than_text_are_formatted_as_json(tmp_path, tokenizer):
    rows = [{"n": 7, "f": 0.5, "b": True, "list": [{"x": "deep"}, "é"], "map": {"k": 1}}]
    prompt = "{n} {f} {b} {n:03d} {list[0][x]} {list} {map[k]}"
    data = load_task(task(tmp_path, rows, prompt=prompt, completion="{b}"), tokenizer, 0)
    assert texts(data, tokenizer) == [('<s>7 0.5 true 007 deep [{"x": "deep"}, "é"] 1', "true</s>")]


def test_prompt_and_completion_are_used_as_they_are(tmp_path, tokenizer):
    rows = [{"prompt": "{literal} ", "completion": "c"}]
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    assert texts(data, tokenizer) == [("<s>{literal} ", "c</s>")]
    assert data.templates == Templates()


def test_instruction_records_get_the_instruction_prompt(tmp_path, tokenizer):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say {hi}.", "input": "", "output": "hi"},
        {"instruction": "Wave.", "output": "o/"},
    ]
    data = load_task(task(tmp_path, rows), tokenizer, 0)
    head = INSTRUCTION_PROMPT.split("{instruction}")[0]
    assert texts(data, tokenizer) == [
        (f"<s>{head}Add.\n\n1 2\n\n### Response:\n", "3</s>"),
        (f"<s>{head}Say {{hi}}.\n\n### Response:\n", "hi</s>"),
        (f"<s>{head}Wave.\n\n### Response:\n", "o/</s>"),
    ]
    # What is stored gives a server the same prompt.
    assert f"<s>{data.templates.prompt.format(instruction='Wave.')}" == texts(data, tokenizer)[2][0]


def test_a_bos_written_in_the_prompt_is_not_doubled(tmp_path, tokenizer):
    data = load_task(task(tmp_path, [{"prompt": "<s>p", "completion": "c</s>"}]), tokenizer, 0)
    assert texts(data, tokenizer) == [("<s>p", "c</s>")]


def test_an_end_that_the_tokenizer_appends_to_every_text_is_not_doubled(tmp_path):
    from tokenizers import processors

    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    data = load_task(task(tmp_path, [{"prompt": "p", "completion": "c"}]), ending, 0)
    assert texts(data, ending) == [("<s>p", "c</s>")]


# --- lengths, limits -------------------------------------------------------------------------------------------------


def test_long_examples_are_cut_at_their_end_or_dropped(tmp_path, tokenizer):
    rows = [{"prompt": "p" * p, "completion": "c" * c} for p, c in [(3, 3), (3, 4), (3, 20), (7, 1), (8, 5), (20, 1)]]
    data = load_task(task(tmp_path, rows, max_length=8, eval={"e": str(tmp_path / "train.jsonl")}), tokenizer, 0)
    # One token a letter, BOS before, EOS after: 8, 9, 25, 10 (nothing left after 8), 15, 23.
    assert texts(data, tokenizer) == [("<s>ppp", "ccc</s>"), ("<s>ppp", "cccc"), ("<s>ppp", "cccc")]
    assert (data.records, data.cut, data.dropped) == (6, 2, 3)
    assert [len(e.example.input_ids) for e in data.evaluation["e"].examples] == [8, 9, 25, 10, 15, 23]  # never cut


def test_prompts_that_fill_max_length_are_reported(tmp_path, tokenizer):
    ((field, message, remedy),) = problems_of(
        task(tmp_path, [{"prompt": "p" * 10, "completion": "c"}], max_length=8), tokenizer
    )
    assert field == "training.max_length"
    assert "every prompt" in message
    assert "12" in remedy  # BOS, ten letters, and one of the completion


def test_limits_take_a_seeded_sample(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}", "completion": f"{i}"} for i in range(50)]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in (("a", rows[:20]), ("b", rows[20:]))]
    settings = task(tmp_path, paths, limit=12, eval={"e": str(paths[1])}, eval_limit=9)
    data, again, other = (load_task(settings, tokenizer, seed) for seed in (0, 0, 1))
    prompts = [t[0] for t in texts(data, tokenizer)]
    assert len(prompts) == len(set(prompts)) == 12
    assert texts(again, tokenizer) == texts(data, tokenizer)
    assert texts(other, tokenizer) != texts(data, tokenizer)
    assert {int(c.removeprefix("<s>")) // 20 for c in prompts} == {0, 1, 2}  # of both files
    assert len(data.evaluation["e"].examples) == 9
    assert len(load_task(settings, tokenizer, 0, eval_limit=4).evaluation["e"].examples) == 4
    assert len(load_task(settings, tokenizer, 0, eval_limit=40).evaluation["e"].examples) == 9


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_missing_field_is_reported_with_the_fields_of_the_record(tmp_path, tokenizer):
    rows = [{"q": "a", "a": "b"}, {"question": "c"}]
    problems = problems_of(task(tmp_path, rows, prompt="{q}", completion="{a}{c}"), tokenizer)
    assert [(field, message) for field, message, _ in problems] == [
        ("record 1", "has no field 'c' (it has: q, a)"),
        ("record 2", "has no field 'q', 'a', 'c' (it has: question)"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "none of the known forms (it has: text)"),
        ({"prompt": None, "completion": "b"}, "null in field 'prompt'"),
        ({"messages": "hi"}, "no list of messages"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "no text content in message 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no answer of the assistant"),
    ],
)
def test_records_that_cannot_be_formatted_are_reported(tmp_path, tokenizer, row, message):
    ((field, reported, remedy),) = problems_of(task(tmp_path, [row]), tokenizer)
    assert field == "record 1"
    assert message in reported
    assert remedy


@pytest.mark.parametrize("prompt", ["{m[x]}", "{list[5]}", "{list[k]}", "{text:d}", "{text:{width}}"])
def test_templates_that_do_not_fit_the_record_are_reported(tmp_path, tokenizer, prompt):
    rows = [{"m": {}, "list": [1], "text": "a", "completion": "b"}]
    ((field, _, remedy),) = problems_of(task(tmp_path, rows, prompt=prompt), tokenizer)
    assert field == "record 1"
    assert remedy


def test_conversations_need_a_chat_template(tmp_path):
    plain = byte_tokenizer()
    plain.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    ((_, message, remedy),) = problems_of(task(tmp_path, rows), plain)
    assert "no chat template" in message
    assert "instruct" in remedy


def test_the_reason_of_a_chat_template_that_refuses_is_reported(tmp_path):
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    ((_, message, _),) = problems_of(task(tmp_path, rows), strict)
    assert "roles must alternate" in message


def test_a_tokenizer_without_an_end_of_sequence_is_reported(tmp_path):
    endless = byte_tokenizer()
    endless.eos_token = None
    ((field, message, remedy),) = problems_of(task(tmp_path, [{"prompt": "p", "completion": "c"}]), endless)
    assert field == "eos_token"
    assert "no end-of-sequence" in message
    assert "tokenizer_config.json" in remedy


def test_right_answers_that_the_metric_cannot_read_are_reported(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": "it is true"}, {"prompt": "p", "completion": "perhaps"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    choices = EvaluationSource(file=path, choices=("true", "false"))
    ((field, message, _),) = problems_of(task(tmp_path, [path], "choice", eval={"e": choices}), tokenizer)
    assert (field, "none of the choices" in message) == ("record 2", True)
    problems = problems_of(task(tmp_path, [path], "gsm8k", eval={"e": str(path)}), tokenizer)
    assert [(field, "(and 1 more like it)" in message) for field, message, _ in problems] == [("record 1", True)]


def test_mistakes_of_all_files_and_tasks_are_reported(tmp_path, tokenizer):
    good = write_jsonl(tmp_path / "good.jsonl", [{"prompt": "p", "completion": "c"}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p"}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    first = task(tmp_path, [good, empty], eval={"e": str(bad)})
    second = task(tmp_path, [bad]).model_copy(update={"name": "u"})
    third = task(tmp_path, [good]).model_copy(update={"name": "v"})
    config = RunConfig(model="tiny", output=tmp_path, tasks=(first, second, third), adapter=AdapterConfig())
    loaded, problems = load_all(config, tokenizer)
    assert list(loaded) == ["v"]
    assert [Path(p.file).name for p in problems] == ["empty.jsonl", "bad.jsonl", "bad.jsonl"]
    assert load_all(config, None) == ({}, problems)  # the records are checked without a tokenizer, too


def test_real_records_of_both_tasks(tokenizer):
    """The two tasks of the paper, on the committed records."""
    maths = TaskConfig(
        name="math",
        alpha=1.0,
        sparsity=0.9,
        metric="gsm8k",
        data=DataConfig(
            train=str(RECORDS / "gsm8k/train.jsonl"),
            eval=str(RECORDS / "gsm8k/test.jsonl"),
            prompt="{question}\n",
            completion="{answer}",
        ),
    )
    data = load_task(maths, tokenizer, 0)
    assert data.dropped == 0
    assert all(float(e.expected) == float(e.expected) for e in data.evaluation["gsm8k"].examples)
    boolq = EvaluationSource(file=RECORDS / "nlu/boolq/test.json", choices=("true", "false"))
    nlu = TaskConfig(
        name="nlu",
        alpha=1.0,
        sparsity=0.9,
        metric="choice",
        data=DataConfig(
            train=tuple(RecordSource(file=path) for path in sorted(RECORDS.glob("nlu/*/train.json"))),
            eval={"boolq": boolq},
            prompt="{instruction}\n",
            completion="{output}",
        ),
    )
    data = load_task(nlu, tokenizer, 0)
    assert {e.expected for e in data.evaluation["boolq"].examples} == {"true", "false"}
    for prompt, completion in texts(data, tokenizer):
        assert prompt.endswith("\n") and completion.startswith("the correct answer is ")
