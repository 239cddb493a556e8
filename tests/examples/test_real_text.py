"""The example on real text, in its quick form: a few steps on a handful of records, and the table that it makes."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml

from loraf_train.settings.loading import load
from tests.records import ROOT, SAMPLE, data_folder
from tests.tools import needs

spec = importlib.util.spec_from_file_location("real_text", ROOT / "examples" / "real-text" / "run.py")
real_text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real_text)

TASKS = ["gsm8k", "boolq", "obqa", "arc"]
QUICK = ["--data", str(SAMPLE), "--steps", "2", "--examples", "2", "--orders", "reverse"]


@pytest.mark.slow
def test_a_sequence_is_trained_and_every_loss_measured(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert real_text.main([*QUICK, "--out", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["order"], run["seed"], run["retention"]) == ("reverse", 0, None)
    assert list(run["after"]) == TASKS[::-1]
    assert [len(losses) for losses in run["after"].values()] == [1, 2, 3, 4]
    assert list(run["base"]) == list(run["as_trained"]) == TASKS[::-1]
    for row in run["table"]:
        assert row["gain"] == pytest.approx(run["base"][row["task"]] - run["after"][row["task"]][row["task"]])
        assert row["end, as trained"] == pytest.approx(row["just trained"], rel=1e-6)  # what masks alone promise
    assert run["table"][0]["gain"] > 0 and run["table"][-1]["kept"] == 1
    assert run["environment"]["versions"].keys() >= {"loraf", "torch"}
    printed = capsys.readouterr().out
    assert "reverse, seed 0, retention default" in printed

    assert real_text.main([*QUICK, "--out", str(out)]) == 0
    again = capsys.readouterr().out
    assert "step" not in again and "reverse, seed 0, retention default" in again  # shown, not trained again
    with pytest.raises(SystemExit, match="has runs with other settings"):
        real_text.main([*QUICK, "--out", str(out), "--steps", "4"])


def test_the_configuration_loads_in_both_orders(tmp_path):
    for order in real_text.ORDERS.values():
        content = real_text.configuration(SAMPLE, order, 3, 7, 5)
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
        config = load(tmp_path / "tasks.yaml")
        assert tuple(task.name for task in config.tasks) == order
        assert {task.metric for task in config.tasks} == {"loss"} and config.seed == 3
        assert {(task.training.max_steps, task.data.eval_limit) for task in config.tasks} == {(7, 5)}
        assert sum(1 - task.sparsity for task in config.tasks) <= 1
    assert real_text.ORDERS["reverse"] == tuple(TASKS[::-1])


def test_training_and_held_out_records_come_from_different_files():
    for task in real_text.configuration(SAMPLE, TASKS, 0, 1, 1)["tasks"]:
        held_out = set(task["data"]["eval"].values())
        assert len(held_out) == len(task["data"]["train"]) and not held_out & set(task["data"]["train"])


@pytest.mark.slow
def test_the_whole_data_sets_are_found():
    whole = data_folder()
    if whole == SAMPLE:
        pytest.skip(needs("real records"))
    for task in real_text.configuration(whole, TASKS, 0, 1, 1)["tasks"]:
        data = task["data"]
        assert [file for file in (*data["train"], *data["eval"].values()) if not real_text.Path(file).is_file()] == []


def test_shares_kept_are_of_the_gain_over_the_base():
    run = {
        "base": {"a": 5.0, "b": 4.0, "c": 2.0},
        "after": {"a": {"a": 1.0}, "b": {"a": 2.0, "b": 4.5}, "c": {"a": 3.0, "b": 3.0, "c": 1.0}},
        "as_trained": {"a": 1.0, "b": 4.5, "c": 1.0},
    }
    rows = real_text.rows(run)
    assert [row["gain"] for row in rows] == [4.0, -0.5, 1.0]
    assert [row["kept"] for row in rows] == [0.5, None, 1.0]  # nothing of b was gained, so nothing can be kept
    assert rows[0]["end, all on"] == 3.0


def test_retention_is_a_setting_only_where_it_is_asked_for():
    assert real_text.retention_setting(None) == []
    assert real_text.retention_setting("off") == ["retention=off"]
    assert real_text.retention_setting("0.2") == ["retention.budget=0.2"]


def test_missing_records_and_wrong_options_are_named(tmp_path, capsys):
    assert real_text.main(["--data", str(tmp_path)]) == 2
    assert f"{tmp_path} has no records: name their folder with --data" in capsys.readouterr().err
    for options, message in (
        (["--orders", "sideways"], "sideways is not one of forward, reverse"),
        (["--seeds", "one"], "give whole numbers"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            real_text.main(options)
        assert ended.value.code == 2 and message in capsys.readouterr().err
