"""loraf.json: the round trip, what its digests cover, and its task sets."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import manifest as manifests
from loraf.errors import CheckpointError, CorruptCheckpoint, UnknownTask
from loraf.manifest import Manifest, Module, Projection, Templates, positions_per_matrix
from tests.loraf.small_manifests import (
    DATA,
    EXTENDED,
    EXTENDED_DATA,
    JSON_VALUES,
    MODULES,
    PATH,
    RANK,
    WHOLE,
    a_manifest,
    a_task,
    sha256_of,
    signed,
)

# --- the number of positions ------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.sampled_from(["0.9", "0.95", "0.99", "0.5", "0", "0.75", "0.999", "0.1", "0.3", "1e-30", "0.0000001"]),
        st.integers(0, 9999).map(lambda n: str(n / 10000)),
        st.floats(0, 1, exclude_max=True).map(repr),
    ),
    st.integers(1, 200_000),
    st.integers(1, 1024),
)
def test_the_number_of_positions_is_exact(sparsity, d_out, rank):
    assert positions_per_matrix(float(sparsity), d_out, rank) == floor((1 - Fraction(sparsity)) * d_out * rank)


@pytest.mark.parametrize(
    ("sparsity", "d_out", "rank", "k"),
    [
        (0.9, 4096, 64, 26214),  # 26214.4
        (0.9, 1000, 10, 1000),  # binary floats give 999
        (0.95, 1000, 2, 100),  # binary floats give 100.00000000000009
        (0.99, 100, 1, 1),  # binary floats give 1.0000000000000009
        (0.7, 10, 1, 3),
        (0.999, 7, 4, 0),
        (0, 7, 4, 28),
    ],
)
def test_the_number_of_positions_by_hand(sparsity, d_out, rank, k):
    assert positions_per_matrix(sparsity, d_out, rank) == k


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 2, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="not in"):
        positions_per_matrix(sparsity, 10, 4)


# --- round trip -------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    (tmp_path / manifests.FILE_NAME).write_bytes(DATA)
    assert manifests.read(tmp_path) == WHOLE
    assert manifests.read(tmp_path).to_json().encode() == DATA


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=5).map("own {}".format), JSON_VALUES, max_size=4),  # none that is read again
    st.floats(-1e6, 1e6),
    st.integers(-(10**30), 10**30),
    st.text(max_size=20),
)
def test_round_trip_of_any_values(training, alpha, seed, template):
    task = a_task("math", training=training, alpha=alpha, templates=Templates(template, template))
    whole = a_manifest(tasks=(task,), projection=Projection("g", seed, "c", 0.5))
    again = manifests.parse(whole.to_json().encode(), PATH)
    assert again == whole
    assert again.adapter_digest == whole.adapter_digest


def test_values_that_json_converts_do_not_break_the_digest():
    """Tuples become lists, and numeric keys become strings, which sort differently."""
    task = a_task("math", training={"tuple": (1, 2), "keys": {10: "a", 9: "b"}})
    again = manifests.parse(a_manifest(tasks=(task,)).to_json().encode(), PATH)
    assert again.task("math").training == {"tuple": [1, 2], "keys": {"10": "a", "9": "b"}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, b"x", "\ud800", Path("x")])
def test_values_without_a_json_form_are_not_written(value):
    with pytest.raises((ValueError, TypeError)):
        a_manifest(tasks=(a_task("math", training={"x": value}),)).to_json()


def test_optional_fields_may_be_missing_and_floats_may_be_integers():
    content = json.loads(DATA)
    for name in ("trained_with", "templates", "training", "scores"):
        del content["tasks"][0][name]
    del content["base_model"]["revision"]
    content["tasks"][0]["alpha"] = 16
    content["tasks"][0]["sparsity"] = 0.75
    read = manifests.parse(signed(content), PATH)
    assert read.task("math") == a_task("math")
    assert read.adapter_digest == WHOLE.adapter_digest
    assert read.base_model.revision is None


def test_without_statistics_and_named_sets_the_bytes_are_those_of_version_1():
    """The digest is of what was written for this manifest when there was no version 2."""
    assert hashlib.sha256(DATA).hexdigest() == "f2278b4ff871b0ed519eaccde3b2542a5ab9025610e653462ef5e912649b8057"
    emptied = dataclasses.replace(EXTENDED.without_statistics(), sets={})
    assert emptied == WHOLE and emptied.to_json().encode() == DATA


@pytest.mark.parametrize(
    "whole",
    [EXTENDED, EXTENDED.without_statistics(), dataclasses.replace(EXTENDED, sets={})],
    ids=["both", "named sets", "statistics"],
)
def test_statistics_and_named_sets_make_it_version_2(whole):
    content = json.loads(whole.to_json())
    assert content["format_version"] == 2
    assert ["statistics" in task for task in content["tasks"]] == [whole.tasks[0].statistics is not None, False]
    assert ("sets" in content) == bool(whole.sets)
    again = manifests.parse(whole.to_json().encode(), PATH)
    assert again == whole and again.to_json() == whole.to_json()


def test_the_json_of_statistics_and_named_sets():
    content = json.loads(EXTENDED_DATA)
    stored = {"path": "statistics/math.safetensors", "bytes": 50, "sha256": "5" * 64}
    assert content["tasks"][0]["statistics"] == stored
    assert content["sets"] == {"support": {"math": 1.0, "nlu": 0.5}, "careful": {"math": 0.25}}


# --- folders ----------------------------------------------------------------------------------------------------


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd" / manifests.FILE_NAME).mkdir(parents=True)
    for folder in (
        tmp_path,
        tmp_path / "none",
        tmp_path / "file",
        tmp_path / "odd",
        tmp_path / ("x" * 5000),
        Path("a\0b"),
    ):
        with pytest.raises(CheckpointError, match=r"loraf-train run") as caught:
            manifests.read(folder)
        assert not isinstance(caught.value, CorruptCheckpoint)
        assert str(folder) in str(caught.value)


# --- digests ----------------------------------------------------------------------------------------------------


def with_task(**changes) -> Manifest:
    return dataclasses.replace(WHOLE, tasks=(dataclasses.replace(WHOLE.tasks[0], **changes), WHOLE.tasks[1]))


@pytest.mark.parametrize(
    "other",
    [
        with_task(scores=()),
        with_task(scores=({"score": 1.0},)),
        with_task(training={"date": "2030-01-01"}),
        with_task(templates=Templates("x", "y")),
        with_task(alpha=16),
        dataclasses.replace(WHOLE, base_model=dataclasses.replace(WHOLE.base_model, name="elsewhere")),
        dataclasses.replace(WHOLE, modules=dict(reversed(WHOLE.modules.items()))),
        EXTENDED,
    ],
)
def test_the_adapter_digest_ignores_what_the_output_does_not_depend_on(other):
    assert other.adapter_digest == WHOLE.adapter_digest


@pytest.mark.parametrize(
    "other",
    [
        with_task(alpha=16.5),
        with_task(name="mathe"),
        with_task(file=dataclasses.replace(WHOLE.tasks[0].file, sha256="0" * 64)),
        dataclasses.replace(WHOLE, rank=RANK + 1),
        dataclasses.replace(WHOLE, projection=dataclasses.replace(WHOLE.projection, seed=1)),
        dataclasses.replace(WHOLE, projection=dataclasses.replace(WHOLE.projection, init_std=0.1)),
        dataclasses.replace(WHOLE, projection=dataclasses.replace(WHOLE.projection, sha256="d" * 64)),
        dataclasses.replace(WHOLE, modules=MODULES | {"model.layers.0.mlp.up_proj": Module(7, 9, "b" * 64)}),
        dataclasses.replace(WHOLE, tasks=WHOLE.tasks[::-1]),
        WHOLE.only(("math",)),
    ],
)
def test_the_adapter_digest_covers_what_the_output_depends_on(other):
    assert other.adapter_digest != WHOLE.adapter_digest


def test_the_adapter_digest_by_hand():
    content = {
        "modules": {name: [m.d_out, m.d_in] for name, m in MODULES.items()},
        "projection": {"generator": "philox4x32-10/normal-65536/1", "init_std": None, "seed": 0, "sha256": "c" * 64},
        "rank": 4,
        "tasks": [[task.name, task.alpha, task.file.sha256] for task in WHOLE.tasks],
    }
    assert WHOLE.adapter_digest == sha256_of(content)


# --- questions --------------------------------------------------------------------------------------------------


def test_the_sets_of_a_manifest():
    assert str(WHOLE.all_tasks()) == "math+nlu"
    assert str(WHOLE.as_trained("math")) == "math"
    assert str(WHOLE.as_trained("nlu")) == "math+nlu"
    for name in ("art", "base", "", "all"):
        with pytest.raises(UnknownTask, match="choose from: math, nlu"):
            WHOLE.as_trained(name)


def test_as_trained_needs_the_earlier_tasks():
    with pytest.raises(UnknownTask, match="trained on top of math"):
        WHOLE.only(("nlu",)).as_trained("nlu")
    # math was removed and trained again on top of nlu, so it is not the math that nlu was trained with.
    again = dataclasses.replace(WHOLE, tasks=(WHOLE.tasks[1], a_task("math", trained_with=("nlu",))))
    with pytest.raises(UnknownTask, match="trained on top of math"):
        again.as_trained("nlu")
    assert str(manifests.parse(again.to_json().encode(), PATH).as_trained("math")) == "nlu+math"


def test_only_restricts_the_tasks():
    assert WHOLE.only(("nlu", "math")) == WHOLE
    assert WHOLE.only(("nlu",)).task_names == ("nlu",)
    with pytest.raises(UnknownTask) as caught:
        WHOLE.only(("art", "math", "science"))
    assert len(caught.value.problems) == 2


def test_named_sets():
    assert str(EXTENDED.named_set("support")) == "math+nlu:0.5"
    with pytest.raises(KeyError):
        EXTENDED.named_set("math")
    assert EXTENDED.only(("nlu", "math")) == EXTENDED
    assert EXTENDED.only(("math",)).sets == {"careful": {"math": 0.25}}
    assert EXTENDED.only(("math",)).task("math").statistics is not None
    assert EXTENDED.only(("nlu",)).sets == {}


def test_free_positions():
    for module, shape in MODULES.items():
        k = positions_per_matrix(0.75, shape.d_out, RANK)
        assert WHOLE.free_positions(module) == shape.d_out * RANK - 2 * k
        assert dataclasses.replace(WHOLE, tasks=()).free_positions(module) == shape.d_out * RANK
    assert WHOLE.tasks[0].parameters == sum(positions_per_matrix(0.75, m.d_out, RANK) for m in MODULES.values())


# --- speed and weight -------------------------------------------------------------------------------------------


def test_reading_a_7b_manifest_is_fast_and_needs_neither_torch_nor_numpy(tmp_path):
    """32 layers, 7 projections, 12 tasks. The whole command may take a second."""
    widths = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    widths |= {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
    modules = {
        f"model.layers.{i}.x.{name}": Module(*shape, "a" * 64) for i in range(32) for name, shape in widths.items()
    }
    k = {name: positions_per_matrix(0.95, m.d_out, 64) for name, m in modules.items()}
    tasks = tuple(a_task(f"task{i}", sparsity=0.95, k=k) for i in range(12))
    whole = a_manifest(rank=64, modules=modules, tasks=tasks)
    (tmp_path / manifests.FILE_NAME).write_text(whole.to_json(), encoding="utf-8")
    start = time.process_time()
    assert manifests.read(tmp_path) == whole
    assert time.process_time() - start < 0.5
    code = (
        "import sys; from pathlib import Path; from loraf import manifest\n"
        "manifest.read(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_two_readings_share_nothing():
    """A caller may change one without changing the other."""
    one, other = manifests.parse(DATA, PATH), manifests.parse(DATA, PATH)
    before = copy.deepcopy(other)
    one.task("math").training["epochs"] = 99
    one.modules.clear()
    assert other == before
