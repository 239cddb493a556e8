"""Streaming: the records of any source one by one, in an order that resumes exactly, in memory that does not grow."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from loraf.errors import ConfigError
from loraf_train.data import records, stream
from loraf_train.data.stream import DrawnExamples, Limits
from loraf_train.data.task_data import load_task
from loraf_train.sequence import resume, runner
from loraf_train.sequence.base_checks import load_tokenizer
from loraf_train.settings import loading
from loraf_train.settings.data import RecordSource
from loraf_train.settings.parts import RetentionConfig
from tests.loraf_train import toys
from tests.loraf_train.command_line import run as command
from tests.loraf_train.interruptions import Stopped, Stopper, contents
from tests.standins import make_model

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(2500)]
LIMITS = Limits(10**6, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def lines(file: Path, rows=ROWS) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write(name: str, folder: Path) -> RecordSource:
    """ROWS in one of the formats."""
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=700)
    elif ".csv" in name:
        with open(file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif name == "saved":
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(file))
        return RecordSource(dataset=str(file))
    elif name == "local":
        file.mkdir()
        lines(file / "train.jsonl")
        return RecordSource(dataset=str(file))
    else:
        lines(file)
    return RecordSource(file=file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved", "local"])
def test_a_stream_has_the_records_that_reading_has(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = write(name, tmp_path)
    assert list(records.stream(source)) == records.read(source)


def test_what_cannot_be_streamed_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:2], indent=1))
    with pytest.raises(ConfigError, match="JSON list.*one object per line"):
        list(records.stream(RecordSource(file=tmp_path / "a.json")))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 5000)[:-20])
    with pytest.raises(ConfigError, match="not a whole gzip file"):
        list(records.stream(RecordSource(file=tmp_path / "b.jsonl.gz")))


def task(folder, **data):
    settings = {"train": (RecordSource(file=folder / "a.jsonl"),), "streaming": True} | data
    training = {"max_steps": 6, "batch_size": 8, "dropout": 0.2, "save_seconds": 0.0, "max_length": 32}
    return toys.task("one", training=training, data=settings)


def drawn(folder, tokenizer, number: int, seed: int = 1) -> DrawnExamples:
    return load_task(task(folder), tokenizer, 0).train.drawn(seed, number, 8, LIMITS)


def test_a_pass_has_every_record_once_and_the_next_one_another_order(tmp_path, tokenizer):
    lines(tmp_path / "a.jsonl")
    whole = [tuple(e.input_ids) for e in load_task(task(tmp_path, streaming=False), tokenizer, 0).train]
    both = [tuple(e.input_ids) for e in drawn(tmp_path, tokenizer, 5000)]
    first, second = both[:2500], both[2500:]
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != whole and first != second
    # A record is drawn from those up to a buffer further on.
    place = {ids: i for i, ids in enumerate(whole)}
    assert all(place[ids] < i + stream.BUFFER for i, ids in enumerate(first))


def test_the_order_depends_on_the_seed_and_reading_may_skip(tmp_path, tokenizer):
    lines(tmp_path / "a.jsonl")
    one, other = drawn(tmp_path, tokenizer, 50), drawn(tmp_path, tokenizer, 50, seed=2)
    examples = list(one)
    assert examples != list(other)
    again = drawn(tmp_path, tokenizer, 50)
    assert [again[i] for i in (3, 20, 49)] == [examples[i] for i in (3, 20, 49)]
    with pytest.raises(RuntimeError):
        again[3]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer, monkeypatch):
    """Five times the file, read to its end: the same peak, with a buffer that is small beside both."""
    monkeypatch.setattr(stream, "BUFFER", 50)

    def peak(count: int) -> int:
        chance = random.Random(0)
        with open(tmp_path / "a.jsonl", "w") as file:
            for i in range(count):
                text = "".join(chance.choices("abcdefgh", k=300))
                file.write(json.dumps({"prompt": f"{i} ", "completion": text}) + "\n")
        examples = load_task(task(tmp_path), tokenizer, 0).train.drawn(0, count, 8, LIMITS)
        tracemalloc.start()
        for _ in examples:
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(1_000), peak(5_000)
    assert large < 1.2 * small + 100_000


def test_a_mistake_beyond_the_first_records_names_its_place(tmp_path, tokenizer):
    lines(tmp_path / "a.jsonl", [*ROWS[:1500], {"prompt": "x"}])
    with pytest.raises(ConfigError, match="record 1501.*no field 'completion'") as caught:
        list(drawn(tmp_path, tokenizer, 1501))
    assert str(tmp_path / "a.jsonl") in caught.value.problems[0].file


def test_what_the_model_cannot_read_is_a_mistake(tmp_path, tokenizer):
    lines(tmp_path / "a.jsonl")
    examples = load_task(task(tmp_path), tokenizer, 0).train
    with pytest.raises(ConfigError, match="the model's embedding has 5 rows"):
        examples.drawn(0, 8, 8, Limits(5, None))[0]
    with pytest.raises(ConfigError, match="3 positions and no more"):
        examples.drawn(0, 8, 8, Limits(10**6, 3))[0]


# --- whole runs ------------------------------------------------------------------------------------------------------


def config(folder, output, data_folder, names=("one",)):
    tasks = [task(data_folder).model_copy(update={"name": name}) for name in names]
    return toys.run_config(folder, output, *tasks, retention=RetentionConfig(budget=0.05))


def data_of(tokenizer):
    return lambda of_task: load_task(of_task, tokenizer, 0)


@pytest.mark.parametrize("at", [("one", "calibration 2"), ("one", "step 4"), ("two", "step 2")], ids="-".join)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(folder, tokenizer, tmp_path, at):
    lines(tmp_path / "a.jsonl")
    whole, again = (config(folder, tmp_path / name, tmp_path, ("one", "two")) for name in ("whole", "again"))
    loaded = runner.load_model(whole)
    runner.run(whole, data_of(tokenizer), None, loaded)
    with pytest.raises(Stopped):
        runner.run(again, data_of(tokenizer), Stopper(*at), loaded)
    observer = Stopper()
    runner.run(again, data_of(tokenizer), observer, loaded)
    assert any("resumes after" in event for _, event in observer.events)
    assert contents(again.output) == contents(whole.output)
    training = runner.Checkpoint.open(whole.output).manifest.task("one").training
    assert training["examples"] == 48 and training["settings"]["data"]["streaming"] is True


def test_records_that_changed_where_it_had_read_stop_a_resumed_run(folder, tokenizer, tmp_path):
    lines(tmp_path / "a.jsonl")
    run = config(folder, tmp_path / "ckpt", tmp_path)
    loaded = runner.load_model(run)
    with pytest.raises(Stopped):
        runner.run(run, data_of(tokenizer), Stopper("one", "step 5"), loaded)
    # Of the same size, so that it shows only when it is read: the first 32 are drawn from the first 1,032.
    changed = [row if i < 1000 else {**row, "completion": row["completion"][::-1]} for i, row in enumerate(ROWS)]
    lines(tmp_path / "a.jsonl", changed)
    with pytest.raises(ConfigError, match="the records that it had read until then have changed"):
        runner.run(run, data_of(tokenizer), None, loaded)


@pytest.mark.parametrize("at", ["calibrated", "step 1"])
def test_records_that_changed_where_calibration_had_read_stop_a_resumed_run(folder, tokenizer, tmp_path, at):
    """The positions were chosen by the first 240; the training has read none of its own, or 8."""
    lines(tmp_path / "a.jsonl")
    of_task = task(tmp_path)
    calibration = of_task.calibration.model_copy(update={"steps": 30})
    run = toys.run_config(folder, tmp_path / "ckpt", of_task.model_copy(update={"calibration": calibration}))
    loaded = runner.load_model(run)
    with pytest.raises(Stopped):
        runner.run(run, data_of(tokenizer), Stopper("one", at), loaded)
    changed = [row if i < 1010 else {**row, "completion": row["completion"][::-1]} for i, row in enumerate(ROWS)]
    lines(tmp_path / "a.jsonl", changed)
    with pytest.raises(ConfigError, match="the records that it had read until then have changed"):
        runner.run(run, data_of(tokenizer), None, loaded)
    lines(tmp_path / "a.jsonl")
    runner.run(run, data_of(tokenizer), None, loaded)


def test_another_size_of_the_file_begins_the_task_again(folder, tokenizer, tmp_path):
    lines(tmp_path / "a.jsonl")
    run = config(folder, tmp_path / "ckpt", tmp_path)
    loaded = runner.load_model(run)
    with pytest.raises(Stopped):
        runner.run(run, data_of(tokenizer), Stopper("one", "step 5"), loaded)
    lines(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])
    observer = Stopper()
    runner.run(run, data_of(tokenizer), observer, loaded)
    assert "the training data changed" in observer.remarks[0]
    assert not (run.output / resume.FOLDER).exists()


FILE = """
model: {model}
output: ckpt
adapter: {{rank: 8, target_modules: [q_proj]}}
calibration: {{steps: 1}}
training: {{{training}}}
tasks: [{{name: a, data: {{train: a.jsonl, streaming: true{data}}}}}]
"""


def test_check_says_that_it_read_only_the_first_thousand(folder, tmp_path, monkeypatch, capsys):
    lines(tmp_path / "a.jsonl")
    (tmp_path / "tasks.yaml").write_text(FILE.format(model=folder, training="max_steps: 2, batch_size: 4", data=""))
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, "check", "tasks.yaml")
    assert status == 0, err
    assert "streaming: only the first 1000 records were read" in out
    assert command(capsys, "run", "tasks.yaml")[0] == 0


@pytest.mark.parametrize(
    ("training", "data", "field"),
    [
        ("epochs: 2", "", "training.max_steps"),
        ("max_steps: 2", ", limit: 5", "tasks[0].data.limit"),
        ("max_steps: 2, early_stopping: {patience: 1}", ", eval: a.jsonl", "training.early_stopping"),
    ],
)
def test_what_needs_the_whole_file_is_refused(tmp_path, training, data, field):
    lines(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "tasks.yaml").write_text(FILE.format(model="tiny", training=training, data=data))
    with pytest.raises(ConfigError) as caught:
        loading.load(tmp_path / "tasks.yaml")
    (problem,) = caught.value.problems
    assert problem.field.startswith(field) and "streams its records" in problem.message
