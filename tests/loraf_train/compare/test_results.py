"""Results survive their JSON form, and a file that does not hold results is refused with its fields."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf.errors import CheckpointError, ConfigError
from loraf_train.compare.results import (
    AS_TRAINED,
    BASE,
    SO_FAR,
    Cost,
    Drift,
    MaskShare,
    Results,
    Run,
    RunScore,
    read,
    to_json,
    write,
)
from tests.loraf_train import compared

NAMES = tuple(task.name for task in compared.TASKS)
SETS = [(task.name, name) for task in compared.TASKS for name in task.evaluations]
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(1, 2**60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def comparisons(draw) -> Results:
    places = st.tuples(st.sampled_from((BASE, *NAMES)), st.sampled_from((SO_FAR, AS_TRAINED)), st.sampled_from(SETS))

    def run(method: str, seed: int) -> Run:
        scores = [
            RunScore(after, acting, *of, draw(finite), draw(counts))
            for after, acting, of in draw(st.lists(places, unique=True, max_size=4))
        ]
        trained = draw(st.lists(st.sampled_from(NAMES), unique=True))
        peak = draw(st.none() | counts)
        costs = [Cost(name, draw(counts), draw(counts), draw(finite), peak, draw(counts)) for name in trained]
        drift = [Drift(after, draw(finite), draw(counts)) for after in (BASE, *trained)]
        masks = [MaskShare(name, draw(st.text()), draw(counts), draw(counts)) for name in trained]
        return Run(method, seed, draw(st.booleans()), *map(tuple, (scores, costs, drift, masks)))

    keys = draw(st.lists(st.tuples(st.text(), st.integers()), unique=True, max_size=3))
    settings = draw(st.dictionaries(st.text(), st.dictionaries(st.text(), json_values, max_size=2), max_size=2))
    return Results(
        draw(st.sampled_from(("single", "sequence"))),
        draw(st.text()),
        draw(counts),
        compared.TASKS,
        tuple(run(*key) for key in keys),
        settings,
        draw(st.dictionaries(st.text(), json_values, max_size=2)),
    )


@given(comparisons())
def test_results_are_read_back_unchanged(tmp_path_factory, results):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write(path, results)
    assert read(path) == results
    assert json.loads(path.read_text()) == to_json(results)


def test_a_diverged_score_is_null_in_the_file_and_read_as_nan(tmp_path):
    results = compared.sequence(1, ("full",))
    (run,) = results.runs
    scores = (dataclasses.replace(run.scores[0], score=math.nan), *run.scores[1:])
    drift = (dataclasses.replace(run.drift[0], loss=math.inf), *run.drift[1:])
    diverged = dataclasses.replace(results, runs=(dataclasses.replace(run, scores=scores, drift=drift),))
    write(tmp_path / "r.json", diverged)
    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert content["runs"][0]["scores"][0]["score"] is None
    (read_back,) = read(tmp_path / "r.json").runs
    assert math.isnan(read_back.scores[0].score) and math.isnan(read_back.drift[0].loss)
    assert read_back.scores[1:] == run.scores[1:] and read_back.drift[1:] == run.drift[1:]


def test_writing_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    first, second = compared.single(1), compared.single(2)
    write(path, first)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            write(path, second)
    assert read(path) == first
    assert os.listdir(tmp_path) == ["results.json"]
    write(path, second)
    assert read(path) == second


def changed(where: str, value: object):
    """Returns a function that changes one field of the JSON form; `where` is its name in messages."""

    def apply(content):
        *path, last = where.replace("[", ".").replace("]", "").split(".")
        for key in path:
            content = content[int(key) if key.isdecimal() else key]
        content[int(last) if last.isdecimal() else last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (changed("protocol", "both"), "protocol", "not single or sequence"),
        (changed("format", 2), "format", "this release reads 1"),
        (changed("parameters", "many"), "parameters", "not an integer"),
        (changed("runs[0].scores[1].score", "high"), "runs[0].scores[1].score", "not a number"),
        (changed("runs[1].scores[0].task", "other"), "runs[1].scores[0].task", "'other' is not a task of the file"),
        (changed("runs[0].scores[0].evaluation", "x"), "runs[0].scores[0].evaluation", "'x' is not an evaluation set"),
        (changed("runs[0].scores[2].after", "x"), "runs[0].scores[2].after", "is not a task of the file"),
        (changed("runs[0].scores[2].acting", "x"), "runs[0].scores[2].acting", "not so-far, as-trained, alone or pair"),
        (changed("runs[0].scores[2].count", 0), "runs[0].scores[2].count", "is below 1"),
        (changed("runs[0].costs[0].task", "x"), "runs[0].costs[0].task", "is not a task of the file"),
        (changed("runs[0].drift[1].after", "x"), "runs[0].drift[1].after", "is not a task of the file"),
        (changed("runs[1].seed", 0), "runs[1]", "repeats runs[0]"),
        (changed("runs[0].costs[1].task", "maths"), "runs[0].costs[1]", "repeats runs[0].costs[0]"),
        (changed("runs[0].surprise", 1), "runs[0].surprise", "is not a known field"),
        (lambda content: content.pop("model"), "model", "is missing"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_with_its_name(tmp_path, change, field, message):
    content = to_json(compared.sequence(2, ("loraf",)))
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read(path)
    (problem,) = caught.value.problems
    assert (problem.field, problem.file) == (field, str(path))
    assert message in problem.message and problem.remedy


def test_the_first_ten_mistakes_are_named_and_the_others_counted(tmp_path):
    content = to_json(compared.single(2))
    for run in content["runs"]:
        for score in run["scores"]:
            score["task"] = "other"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read(path)
    problems = caught.value.problems
    total = sum(len(run["scores"]) for run in content["runs"])
    assert len(problems) == 11 and problems[-1].message.startswith(f"{total - 10} more fields")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "not an object"), ('{"format": NaN}', "is not JSON")],
)
def test_a_file_that_is_missing_or_not_results_is_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert all(problem.file == str(path) and problem.remedy for problem in caught.value.problems)
