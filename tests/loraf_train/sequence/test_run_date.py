"""The date in a run's prompts: recorded with the unfinished and with the finished task, and taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date

import pytest
import torch

from loraf_train.sequence import resume, runner
from loraf_train.sequence.preflight import prepare, recorded_date
from tests.loraf_train.interruptions import Stopped, Stopper, data, run_config
from tests.standins import byte_tokenizer, make_model

DAY = date(2024, 2, 29)


def dated(day: str) -> dict:
    return {name: replace(task, date=day) for name, task in data().items()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(configuration, loaded model) of two tasks, of which the first was stopped in its training."""
    folder = make_model("mistral", tmp_path_factory.mktemp("mistral"))
    config = run_config(folder, tmp_path_factory.mktemp("run") / "ckpt")
    loaded = runner.load_model(config)
    with pytest.raises(Stopped):
        runner.run(config, dated(DAY.isoformat()), Stopper("one", "step 2"), loaded)
    return config, loaded


def test_the_date_of_a_run_is_that_of_its_beginning(begun):
    config, loaded = begun
    assert recorded_date(config.output.with_name("other")) is None
    assert recorded_date(config.output) == DAY
    with pytest.raises(Stopped):
        runner.run(config, dated(DAY.isoformat()), observer := Stopper("one", "finished"), loaded)
    assert observer.remarks == []
    assert [event for _, event in observer.events[:1]] == ["resumes after training step 1 of 6"]
    assert recorded_date(config.output) == DAY  # between two tasks, when there is no state
    checkpoint = runner.run(config, dated(DAY.isoformat()), None, loaded)
    assert [task.training["date"] for task in checkpoint.manifest.tasks] == ["2024-02-29", "2024-02-29"]
    assert recorded_date(config.output) == DAY


@pytest.mark.parametrize(("before", "now"), [("", "2024-02-29"), ("2024-02-29", "2024-03-01")])
def test_a_state_of_another_date_is_not_used_and_the_reason_is_reported(begun, tmp_path, before, now):
    config, loaded = begun
    config = config.model_copy(update={"output": tmp_path / "ckpt", "tasks": config.tasks[:1]})
    with pytest.raises(Stopped):
        runner.run(config, dated(before), Stopper("one", "step 2"), loaded)
    with pytest.raises(Stopped):
        runner.run(config, dated(now), observer := Stopper("one", "step 1"), loaded)
    (remark,) = observer.remarks
    assert f"date was {before!r}, is {now!r}".replace("''", "none") in remark


def test_a_task_whose_prompts_name_no_date_records_none(begun, tmp_path):
    config, loaded = begun
    config = config.model_copy(update={"output": tmp_path / "ckpt", "tasks": config.tasks[:1]})
    checkpoint = runner.run(config, dated(""), None, loaded)
    assert "date" not in checkpoint.manifest.tasks[0].training
    assert recorded_date(config.output) is None


def test_a_run_that_goes_on_reads_its_records_on_the_date_of_its_beginning(tmp_path):
    folder = make_model("mistral", tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') + ' ' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    file = tmp_path / "tasks.yaml"
    file.write_text("model: ./model\noutput: ckpt\nadapter: {rank: 8}\ntasks: [{name: t, data: {train: rows.jsonl}}]\n")
    assert prepare(file).data["t"].date == date.today().isoformat()
    (tmp_path / "ckpt").mkdir()
    resume.ResumeStore(tmp_path / "ckpt", "t", {"date": "2024-02-29"}, {}, 0, torch.device("cpu")).save(None)
    data = prepare(file).data["t"]
    assert data.date == "2024-02-29"
    assert data.templates.prompt.startswith("2024-02-29 ")
