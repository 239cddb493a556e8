"""Pictures, read back from their SVG: bars and their heights, the numbers in the cells, the labels."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest

from loraf.errors import ConfigError
from loraf_train.compare.report import bars, maps, pictures
from loraf_train.compare.results import BASE, Results, ScoredTask
from loraf_train.compare.statistics import Statistics
from tests.loraf_train import compared

SVG = "{http://www.w3.org/2000/svg}"
LOSS = ScoredTask("text", "loss", False, {"text": 30})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    """The pictures of both protocols: name → path of the SVG."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = pictures.draw(compared.single(3), folder) + pictures.draw(compared.sequence(3), folder)
    return {path.stem: path for path in paths if path.suffix == ".svg"}


def texts(svg: Path) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.parse(svg).iter(f"{SVG}text")]


def boxes(svg: Path, prefix: str) -> dict[str, tuple[float, float, float, float, str]]:
    """id → (left, right, top, bottom, colour) of every path whose id begins with `prefix`."""
    paths = {}
    for group in ET.parse(svg).iter(f"{SVG}g"):
        name = group.get("id", "")
        if name.startswith(prefix):
            path = group.find(f"{SVG}path")
            points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
            xs, ys = zip(*points, strict=True)
            colour = re.search(r"(?:fill|stroke): (#\w+)", path.get("style"))[1]
            paths[name] = (min(xs), max(xs), min(ys), max(ys), colour)
    return paths


def heights(svg: Path, prefix: str) -> dict[str, float]:
    return {name: bottom - top for name, (_, _, top, bottom, _) in boxes(svg, prefix).items()}


def ids(svg: Path, prefix: str) -> list[str]:
    return [g.get("id") for g in ET.parse(svg).iter(f"{SVG}g") if g.get("id", "").startswith(prefix)]


# --- bars -------------------------------------------------------------------------------------------------------


def test_single_has_a_bar_for_each_method_and_set_as_high_as_its_score(drawn):
    statistics = Statistics(compared.single(3))
    estimates = {}
    for method in (None, *compared.METHODS):
        label = method or "base-model"
        for task in compared.TASKS:
            for name in task.evaluations:
                estimates[f"bar-{label}-{name}"] = statistics.of_set(method, task, name, task.name if method else BASE)
        estimates[f"bar-{label}-mean"] = statistics.overall(method)
    assert len(estimates) == 20
    shown = boxes(drawn["scores"], "bar-")
    (floor,) = {round(bottom, 3) for _, _, _, bottom, _ in shown.values()}
    unit = (floor - shown["bar-loraf-gsm8k"][2]) / estimates["bar-loraf-gsm8k"].mean
    for name, (_, _, top, _, _) in shown.items():
        assert (floor - top) / unit == pytest.approx(estimates.pop(name).mean, rel=1e-3)
    assert not estimates


def test_whiskers_span_the_interval(drawn):
    statistics = Statistics(compared.single(3))
    floor = boxes(drawn["scores"], "bar-loraf-gsm8k")["bar-loraf-gsm8k"][3]
    top = boxes(drawn["scores"], "bar-loraf-gsm8k")["bar-loraf-gsm8k"][2]
    unit = (floor - top) / statistics.of_set("loraf", compared.TASKS[0], "gsm8k", "maths").mean
    whiskers = boxes(drawn["scores"], "whisker-")
    assert len(whiskers) == 19  # the base model's mean of several sets has no interval
    for method in compared.METHODS:
        _, _, top, bottom, _ = whiskers[f"whisker-bar-{method}-mean"]
        ends = (floor - bottom) / unit, (floor - top) / unit
        assert ends == pytest.approx(statistics.overall(method).interval, rel=1e-3)


def test_single_bars_of_a_group_are_side_by_side_in_different_colours(drawn):
    shown = boxes(drawn["scores"], "bar-")
    group = [shown[f"bar-{method}-boolq"] for method in ("base-model", *compared.METHODS)]
    assert all(one[1] < other[0] for one, other in zip(group, group[1:], strict=False))
    assert len({colour.lower() for *_, colour in group}) == 4
    for method in compared.METHODS:
        assert len({shown[f"bar-{method}-{name}"][4] for name in ("gsm8k", "boolq", "mean")}) == 1


def test_single_has_labels_for_sets_methods_and_means(drawn):
    labels = texts(drawn["scores"])
    for label in ("gsm8k", "boolq", "arc_easy", "code", "200", "100", "80", "50", "base model", *compared.METHODS):
        assert label in labels
    assert "share of correct answers" in labels and "evaluation set and its number of examples" in labels
    assert any("mean of 3 seeds; whiskers: 95 % t interval" in text for text in labels)
    means = Statistics(compared.single(3))
    for method in compared.METHODS:
        assert f"{means.overall(method).mean:.2f}" in labels


def test_losses_have_their_own_axis(tmp_path):
    results = compared.single(1, tasks=(*compared.TASKS, LOSS))
    (_, svg) = pictures.draw(results, tmp_path)
    labels = texts(svg)
    assert "loss, nats per token (lower is better)" in labels and "share of correct answers" in labels
    assert not any("mean of" in text and "sets" in text for text in labels)
    assert len(ids(svg, "bar-")) == 4 * 5
    assert not [name for name in ids(svg, "whisker-") if name.endswith("text")]  # one seed: a loss has no interval


def test_sequence_has_two_bars_per_method_for_the_first_task(drawn):
    statistics = Statistics(compared.sequence(3))
    task = compared.TASKS[0]
    expected = {}
    for method in compared.METHODS:
        expected[f"bar-{method}-just-trained"] = statistics.of_task(method, task, "maths").mean
        expected[f"bar-{method}-after-the-last-task"] = statistics.of_task(method, task, "code").mean
    shown = heights(drawn["kept"], "bar-")
    unit = shown["bar-loraf-just-trained"] / expected["bar-loraf-just-trained"]
    assert {name: height / unit for name, height in shown.items()} == pytest.approx(expected, rel=1e-3)
    labels = texts(drawn["kept"])
    assert {"just trained (maths on)", "after the last task (maths+nlu+code on)", "base model: 0.100"} <= set(labels)
    for method in compared.METHODS:
        assert f"{100 * statistics.retained(method, task).mean:.1f} %" in labels
    assert "200 examples" in labels


def test_a_method_that_diverged_has_no_bar(tmp_path):
    results = compared.sequence(1)
    runs = [
        dataclasses.replace(run, scores=tuple(dataclasses.replace(s, score=math.nan) for s in run.scores))
        if run.method == "full"
        else run
        for run in results.runs
    ]
    paths = pictures.draw(dataclasses.replace(results, runs=tuple(runs)), tmp_path)
    kept = next(path for path in paths if path.name == "kept.svg")
    assert {name.split("-")[1] for name in ids(kept, "bar-")} == {"loraf", "lora"}
    assert "nan" in texts(tmp_path / "matrix.svg")


def test_there_are_enough_different_colours():
    assert len(set(bars.COLOURS)) == len(bars.COLOURS) >= 5


# --- maps -------------------------------------------------------------------------------------------------------


def test_the_matrix_shows_r_of_every_method_with_its_numbers(drawn):
    statistics = Statistics(compared.sequence(3))
    shown, labels = boxes(drawn["matrix"], "cell-"), texts(drawn["matrix"])
    assert len(shown) == 3 * 4 * 3
    numbers = [
        f"{statistics.of_task(method, task, after).mean:.2f}"
        for method in compared.METHODS
        for after in ("", "maths", "nlu", "code")
        for task in compared.TASKS
    ]
    for number in set(numbers):
        assert labels.count(number) == numbers.count(number)
    for method in compared.METHODS:
        assert f"{method} (3 seeds)" in labels
    assert [labels.count(row) for row in ("base model", "after maths", "after nlu", "after code")] == [3] * 4
    assert {"maths", "nlu", "code", "(200)", "(180)", "(50)"} <= set(labels)
    colours = {name: box[4] for name, box in shown.items()}
    assert colours["cell-full-1-0"] != colours["cell-full-3-0"]  # learned, then forgotten


def test_the_matrix_has_rows_by_time_and_columns_by_task(drawn):
    shown = boxes(drawn["matrix"], "cell-lora-")
    for i in range(4):
        for j in range(3):
            left, right, top, bottom, _ = shown[f"cell-lora-{i}-{j}"]
            assert i == 0 or top == pytest.approx(shown[f"cell-lora-{i - 1}-{j}"][3], abs=0.01)
            assert j == 0 or left == pytest.approx(shown[f"cell-lora-{i}-{j - 1}"][1], abs=0.01)


def test_the_map_shows_positions_by_layer_and_projection(drawn):
    results = compared.sequence(3)
    masks = results.runs[0].masks
    labels = texts(drawn["positions"])
    total = sum({mask.module: mask.size for mask in masks}.values())
    free = total
    for task in ("maths", "nlu", "code"):
        own = sum(mask.positions for mask in masks if mask.task == task)
        free -= own
        assert f"{task}: {own:,} positions, {100 * own / total:.3g} % of all" in labels
        assert len(ids(drawn["positions"], f"cell-task-{task}-")) == 12
    assert f"still free: {free:,} positions, {100 * free / total:.3g} % of all" in labels
    assert len(ids(drawn["positions"], "cell-free-")) == 12
    assert all(labels.count(name) == 4 for name in ("q_proj", "v_proj", "down_proj", "layer"))
    for mask in masks:
        assert str(mask.positions) in labels
    layers = boxes(drawn["positions"], "cell-task-maths-0-")  # q_proj, where each layer has fewer than the one before
    assert len({box[4] for box in layers.values()}) == 4
    assert [layers[f"cell-task-maths-0-{i}"][0] for i in range(4)] == sorted(box[0] for box in layers.values())


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.31.self_attn.q_proj", (31, "q_proj")),
        ("transformer.h.0.attn.c_attn", (0, "c_attn")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_layer_and_projection_of_a_module(module, place):
    assert maps._place(module) == place


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (26214, "26.2k"), (5.5e6, "5.5M")]
)
def test_counts_are_shortened_to_three_digits(count, text):
    assert maps._short(int(count)) == text


def test_without_masks_there_is_no_map_of_positions(tmp_path):
    results = compared.sequence(1, ("lora", "full"))
    assert [path.name for path in pictures.draw(results, tmp_path)] == [
        "kept.png", "kept.svg", "matrix.png", "matrix.svg",
    ]  # fmt: skip


def test_pictures_of_one_task_or_of_nothing(tmp_path):
    one = compared.sequence(1, tasks=compared.TASKS[:1])
    assert [path.stem for path in pictures.draw(one, tmp_path)] == ["matrix", "matrix", "positions", "positions"]
    nothing = Results("sequence", "tiny", 1, compared.TASKS, ())
    assert pictures.draw(nothing, tmp_path) == []
    assert pictures.draw(dataclasses.replace(nothing, protocol="single"), tmp_path) == []


# --- files ------------------------------------------------------------------------------------------------------


def test_every_picture_is_written_as_png_and_svg_a_thousand_pixels_wide(tmp_path):
    paths = pictures.draw(compared.sequence(1), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        f"{name}.{kind}" for name in ("kept", "matrix", "positions") for kind in ("png", "svg")
    ]
    for path in paths[::2]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20]) == 1000


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes_under_any_settings(drawn, tmp_path):
    """In another process, and here under other settings, which stay as they were."""
    code = (
        "import sys; from pathlib import Path; from tests.loraf_train import compared\n"
        "from loraf_train.compare.report import pictures\n"
        "for results in (compared.single(3), compared.sequence(3)): pictures.draw(results, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True, timeout=300)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.grid": True, "svg.fonttype": "path"}):
        pictures.draw(compared.single(3), tmp_path / "here")
        assert matplotlib.rcParams["font.size"] == 30 and matplotlib.rcParams["svg.fonttype"] == "path"
    for name, path in drawn.items():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), name
    assert (tmp_path / "here" / "scores.svg").read_bytes() == drawn["scores"].read_bytes()
    assert b"date" not in drawn["scores"].read_bytes().lower()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken: cannot be written"):
        pictures.draw(compared.single(1), tmp_path / "taken")


def test_without_matplotlib_the_message_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'loraf\[compare\]'"):
        pictures.draw(compared.single(1), tmp_path)
