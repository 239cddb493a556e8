"""The report of a checkpoint: scores by set, and masks as they lie in B."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from loraf.checkpoint import Checkpoint
from loraf_serve.adapters.checkpoint_folder import CheckpointFolder, read_values
from loraf_serve.http.report import BINS, report_of
from tests.loraf_serve.harness import TASKS, checkpoint_folder


def entry(task_set: str, score: float, evaluation: str = "test", metric: str = "exact_match") -> dict:
    return {"set": task_set, "evaluation": evaluation, "metric": metric, "score": score, "count": 10}


@pytest.fixture
def scored(tmp_path):
    """A checkpoint's folder with scores."""
    shutil.copytree(checkpoint_folder(), tmp_path / "scored")
    checkpoint = Checkpoint.open(tmp_path / "scored")
    scores = [entry("math", 0.9), entry("math+nlu", 0.8), entry("math+nlu+code", 0.7), entry("base", 0.1)]
    checkpoint.set_scores("math", [*scores, entry("math", 1.5, "text", "loss")])
    checkpoint.set_scores("code", [entry("math+nlu+code", 0.6)])
    return tmp_path / "scored"


def served(folder, tasks=None):
    return CheckpointFolder.read(folder, tasks).served_as("trio")


def test_scores_are_told_by_what_was_on(scored):
    report = report_of(served(scored))
    assert json.loads(json.dumps(report)) == report
    assert [task["name"] for task in report["tasks"]] == list(TASKS)
    rows = {(row["task"], row["evaluation"]): row for row in report["scores"]}
    math = rows["math", "test"]
    assert (math["as_trained"], math["all"], math["count"]) == (0.9, 0.7, 10)
    assert math["others"] == [{"set": "math+nlu", "score": 0.8}, {"set": "base", "score": 0.1}]
    assert (rows["math", "text"]["as_trained"], rows["math", "text"]["all"]) == (1.5, None)
    assert rows["code", "test"]["as_trained"] == rows["code", "test"]["all"] == 0.6 and len(rows) == 3


def test_a_task_without_those_that_it_was_trained_with_has_no_score_as_trained(scored):
    (row,) = report_of(served(scored, ("code",)))["scores"]
    assert (row["as_trained"], row["all"]) == (None, None) and row["others"][0]["score"] == 0.6


def test_masks_are_counted_where_they_lie(scored):
    report = report_of(served(scored))
    checkpoint = Checkpoint.open(scored)
    assert report["masks"]["bins"] == BINS and len(report["masks"]["modules"]) == 14
    for module in report["masks"]["modules"]:
        owners = np.full((checkpoint.manifest.modules[module["name"]].d_out, checkpoint.manifest.rank), -1)
        for i, task in enumerate(TASKS):
            owners[checkpoint.tasks[task][module["name"]].dense() != 0] = i
        assert module["positions"] == owners.size and module["free"] == (owners == -1).sum()
        for i in range(len(TASKS)):
            assert module["owned"][i] == (owners == i).sum()
            expected = [1000 * (part == i).mean() for part in np.array_split(owners, BINS)]
            assert module["rows"][i] == pytest.approx(expected, abs=0.51)


def test_from_memory_and_from_the_folder_it_is_the_same(scored):
    assert report_of(read_values(served(scored))) == report_of(served(scored))


def test_what_a_client_may_not_know_is_left_out(scored):
    report = report_of(served(scored), {"math", "code"})
    assert "nlu" not in json.dumps(report)
    assert [task["name"] for task in report["tasks"]] == ["math", "code"]
    assert all(len(module["owned"]) == len(module["rows"]) == 2 for module in report["masks"]["modules"])
    (math, _) = (row for row in report["scores"] if row["task"] == "math")
    assert math["all"] is None and math["others"] == [{"set": "base", "score": 0.1}]


@pytest.mark.parametrize("change", ["another", "damaged", "gone"])
def test_a_folder_that_has_changed_has_no_masks_and_is_not_named(scored, change):
    adapter = served(scored)
    file = scored / adapter.manifest.tasks[0].file.path
    if change == "another":
        shutil.rmtree(scored)
        shutil.copytree(checkpoint_folder(1), scored)
    elif change == "damaged":
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\0")
    else:
        shutil.rmtree(scored)
    report = report_of(adapter)
    assert report["masks"] is None and "changed since it was loaded" in report["masks_missing"]
    assert report["scores"] and str(scored) not in json.dumps(report)
