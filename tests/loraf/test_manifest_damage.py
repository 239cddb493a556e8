"""A damaged or wrong manifest is refused with the name of the field, never partly understood."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf import manifest as manifests
from loraf.errors import CheckpointError, CorruptCheckpoint, LorafError
from tests.loraf.small_manifests import (
    DATA,
    EXTENDED,
    EXTENDED_DATA,
    JSON_VALUES,
    PATH,
    RANK,
    WHOLE,
    changed,
    sha256_of,
    signed,
)


def refusal(data: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        manifests.parse(data, PATH)
    for problem in caught.value.problems:
        assert problem.file == str(PATH)
        assert problem.message
        assert problem.remedy
    return caught.value


def fields(error: LorafError) -> set[str]:
    return {problem.field for problem in error.problems}


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x01, 0x02, 0x20, 0x80, 0xFF])
@pytest.mark.parametrize(("data", "whole"), [(DATA, WHOLE), (EXTENDED_DATA, EXTENDED)], ids=["version 1", "version 2"])
def test_every_flipped_byte_is_refused_or_means_the_same(bits, data, whole):
    refused = 0
    for i in range(len(data)):
        damaged = data[:i] + bytes([data[i] ^ bits]) + data[i + 1 :]
        try:
            read = manifests.parse(damaged, PATH)
        except CheckpointError as error:
            refused += 1
            assert str(PATH) in str(error)
        else:
            assert read == whole, i
            assert data[i] in b" \n", (i, data[i - 10 : i + 10])
    assert refused > len(data) * 0.6


def test_every_truncation_is_refused():
    for length in range(len(DATA) - 1):  # the last byte is a newline
        with pytest.raises(CheckpointError, match="not"):
            manifests.parse(DATA[:length], PATH)
    assert manifests.parse(DATA[:-1], PATH) == WHOLE


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(data):
    refusal(data)


@given(JSON_VALUES)
def test_any_json_is_refused(value):
    refusal(json.dumps(value).encode())
    for version in (1, 2):
        refusal(json.dumps({"format": "loraf", "format_version": version, "x": value}).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"\x00" * 20, "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (DATA.decode().encode("utf-16"), "is not JSON"),
        (b"\xef\xbb\xbf" + DATA, "is not JSON"),
        (DATA + b"{}", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (DATA.replace(b'"rank": 4', b'"rank": NaN'), "NaN is not JSON"),
        (DATA.replace(b'"rank": 4', b'"rank": -Infinity'), "-Infinity is not JSON"),
        (DATA.replace(b'"rank": 4', b'"rank": 1e999'), "too large"),
        (DATA.replace(b'"rank": 4', b'"rank": ' + b"1" * 5000), "is not JSON"),
        (DATA.replace(b'"rank": 4', b'"rank": 4, "rank": 4'), "duplicate key 'rank'"),
        (DATA.replace(b'"org/model"', b'"\\ud800"'), "is not JSON"),
        (b"null", "is not 'loraf'"),
        (b"{}", "is not 'loraf'"),
        (b"[]", "is not 'loraf'"),
    ],
)
def test_bytes_that_are_not_a_manifest_are_refused(data, words):
    error = refusal(data)
    assert isinstance(error, CorruptCheckpoint)
    assert words in str(error)


@pytest.mark.parametrize("version", [0, 3, 10**30, -1, "1", 1.0, True, None, [1]])
def test_an_unknown_version_is_refused_by_name(version):
    error = refusal(changed("format_version", version))
    assert not isinstance(error, CorruptCheckpoint)
    assert fields(error) == {"format_version"}
    assert "use a release" in str(error)


def test_a_missing_version_or_digest_is_refused():
    assert fields(refusal(changed("format_version", 0, remove=True))) == {"format_version"}
    content = json.loads(DATA)
    del content["digest"]
    assert fields(refusal(json.dumps(content).encode())) == {"digest"}
    content["digest"] = ["x"]
    assert fields(refusal(json.dumps(content).encode())) == {"digest"}


# --- wrong, with digests that fit -------------------------------------------------------------------------------


def leaves(value, path: str = ""):
    """Yields the path of every value of the manifest, separated by slashes."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, f"{path}/{key}" if path else str(key))


FREE = ("/training/", "/scores/0/")  # these may hold any value
PLACES = [
    path
    for path in leaves(json.loads(EXTENDED_DATA))
    if path not in ("format", "format_version", "digest", "adapter_digest") and not any(part in path for part in FREE)
]


@pytest.mark.parametrize("value", [None, True, -1, 0.5, "text", [], ["text"], {}, {"x": 1}, [[]], 10**400])
def test_a_wrong_type_anywhere_names_the_field(value):
    taken = 0
    for path in PLACES:
        data = changed(path, value, data=EXTENDED_DATA)
        if json.loads(data)["modules"] == {}:
            continue
        try:
            manifests.parse(data, PATH)
        except CheckpointError as error:
            top = path.split("/")[0]
            top = ("tasks", "sets") if top == "tasks" else top  # a set of a task that is gone
            assert any(field.startswith(top) for field in fields(error)), (path, str(error))
        else:
            taken += 1
    # Strings may be any string, free values any value, optional fields null. Everything else is refused.
    assert taken < len(PLACES) / 2


OPTIONAL = {
    "revision",
    "shapes",
    "init_std",
    "tasks",
    "trained_with",
    "templates",
    "prompt",
    "completion",
    "special_tokens",
    "training",
    "scores",
    "statistics",
    "sets",
}
# Entries of lists, and of dicts with arbitrary keys, are not fields and may be missing.
NAMED = [
    p
    for p in PLACES
    if not p.split("/")[-1].isdigit() and not p.startswith(("modules/model.", "base_model/shapes/", "sets/"))
]
NAMED += [p for p in PLACES if p.startswith("modules/model.") and p.count("/") == 2]


@pytest.mark.parametrize("path", NAMED)
def test_a_missing_field_is_named_unless_it_is_optional(path):
    name = path.split("/")[-1]
    whole = DATA if path == "tasks" else EXTENDED_DATA  # without its tasks a named set is inconsistent
    data = changed(path, None, remove=True, data=whole)
    if name in OPTIONAL:
        assert manifests.parse(data, PATH).rank == RANK
    else:
        assert any(name in problem.field + problem.message for problem in refusal(data).problems)


@pytest.mark.parametrize(
    "path",
    [
        *("extra", "base_model/extra", "projection/extra", "tasks/0/extra", "tasks/1/file/extra"),
        *("tasks/0/templates/extra", "tasks/0/statistics/extra"),
    ],
)
def test_an_unknown_field_is_named(path):
    """Ignoring it would lose it when the manifest is written next."""
    error = refusal(changed(path, 1, data=EXTENDED_DATA))
    assert "is not a known field" in str(error)
    assert "extra" in next(iter(fields(error)))


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("rank", 0, "rank"),
        ("rank", -4, "rank"),
        ("rank", 2**31, "rank"),
        ("rank", 10**30, "rank"),
        ("rank", 4.0, "rank"),
        ("rank", "4", "rank"),
        ("rank", 8, "tasks[0].k"),
        ("modules", {}, "modules"),
        ("modules/model.layers.0.mlp.up_proj/d_in", 0, "modules.model.layers.0.mlp.up_proj"),
        ("modules/model.layers.0.mlp.up_proj/d_in", 2**30, "modules.model.layers.0.mlp.up_proj"),
        ("modules/model.layers.0.mlp.up_proj/d_out", -7, "modules.model.layers.0.mlp.up_proj"),
        ("projection/seed", 0.0, "projection.seed"),
        ("projection/seed", True, "projection.seed"),
        ("projection/init_std", 0, "projection.init_std"),
        ("projection/init_std", -0.1, "projection.init_std"),
        ("projection/init_std", 1e-40, "projection.init_std"),
        ("projection/init_std", 1e39, "projection.init_std"),
        ("projection/init_std", 10**400, "projection.init_std"),
        ("base_model/shapes/hidden_size", "8", "base_model.shapes.hidden_size"),
        ("base_model/fingerprint", None, "base_model.fingerprint"),
        ("tasks/0/name", "nlu", "tasks[1].name"),
        ("tasks/0/name", "../x", "tasks[0].name"),
        ("tasks/0/name", "base", "tasks[0].name"),
        ("tasks/0/name", ["math"], "tasks[0].name"),
        ("tasks/0/alpha", 1e39, "tasks[0].alpha"),
        ("tasks/0/alpha", 10**400, "tasks[0].alpha"),
        ("tasks/0/alpha", True, "tasks[0].alpha"),
        ("tasks/0/sparsity", 1, "tasks[0].sparsity"),
        ("tasks/0/sparsity", -0.5, "tasks[0].sparsity"),
        ("tasks/0/sparsity", 0.5, "tasks[0].k"),
        ("tasks/0/dtype", "float64", "tasks[0].dtype"),
        ("tasks/0/dtype", "torch.load", "tasks[0].dtype"),
        ("tasks/0/file/path", "../../etc/passwd", "tasks[0].file.path"),
        ("tasks/0/file/path", "/etc/passwd", "tasks[0].file.path"),
        ("tasks/0/file/path", "tasks/nlu.safetensors", "tasks[0].file.path"),
        ("tasks/0/file/bytes", "100", "tasks[0].file.bytes"),
        ("tasks/0/k", {}, "tasks[0].k"),
        ("tasks/0/k/model.layers.0.mlp.up_proj", 8, "tasks[0].k"),
        ("tasks/0/k/unheard.of", 3, "tasks[0].k"),
        ("tasks/0/trained_with", "nlu", "tasks[0].trained_with"),
        ("tasks/0/trained_with", ["math"], "tasks[0].trained_with"),
        ("tasks/1/trained_with", ["math", "math"], "tasks[1].trained_with"),
        ("tasks/1/trained_with", [1], "tasks[1].trained_with[0]"),
        ("tasks/0/templates/prompt", 3, "tasks[0].templates.prompt"),
        ("tasks/0/training", [], "tasks[0].training"),
        ("tasks/0/scores", {}, "tasks[0].scores"),
        ("tasks/0/scores/0", "good", "tasks[0].scores[0]"),
        ("tasks/0", "math", "tasks[0]"),
        ("tasks", {"math": 1}, "tasks"),
    ],
)
def test_inconsistent_values_are_named(path, value, field):
    error = refusal(changed(path, value))
    assert isinstance(error, CorruptCheckpoint)
    assert field in fields(error), str(error)


LARGEST = 8 * (17 + 2 * RANK) * (RANK + 64) + 2**26 + 8  # 17 rows in two modules


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("tasks/0/statistics", [], "tasks[0].statistics"),
        ("tasks/0/statistics/path", "../../etc/passwd", "tasks[0].statistics.path"),
        ("tasks/0/statistics/path", "/etc/passwd", "tasks[0].statistics.path"),
        ("tasks/0/statistics/path", "statistics/nlu.safetensors", "tasks[0].statistics.path"),
        ("tasks/0/statistics/path", "tasks/math.safetensors", "tasks[0].statistics.path"),
        ("tasks/0/statistics/bytes", -1, "tasks[0].statistics.bytes"),
        ("tasks/0/statistics/bytes", LARGEST + 1, "tasks[0].statistics.bytes"),
        ("tasks/0/statistics/bytes", 2**62, "tasks[0].statistics.bytes"),
        ("tasks/0/statistics/bytes", 1.0, "tasks[0].statistics.bytes"),
        ("tasks/0/statistics/sha256", None, "tasks[0].statistics.sha256"),
        ("sets", [], "sets"),
        ("sets/support", {}, "sets.support"),
        ("sets/support", ["math"], "sets.support"),
        ("sets/support", "math", "sets.support"),
        ("sets/support", None, "sets.support"),
        ("sets/support/math", "1", "sets.support.math"),
        ("sets/support/math", True, "sets.support.math"),
        ("sets/support/math", None, "sets.support.math"),
        ("sets/support/math", 16.5, "sets.support.math"),
        ("sets/support/math", -1e20, "sets.support.math"),
        ("sets/support/math", 10**400, "sets.support.math"),
        ("sets/support/art", 1.0, "sets.support"),
        ("sets/support/\x1b[31m", 1.0, "sets.support"),
        ("sets/math", {"nlu": 1.0}, "sets.math"),
        ("sets/all", {"nlu": 1.0}, "sets"),
        ("sets/base", {"nlu": 1.0}, "sets"),
        ("sets/Support", {"nlu": 1.0}, "sets"),
        ("sets/a+b", {"nlu": 1.0}, "sets"),
        ("sets/", {"nlu": 1.0}, "sets"),
        ("sets/\x1b[31m", {"nlu": 1.0}, "sets"),
        ("sets/" + "x" * 5000, {"nlu": 1.0}, "sets"),
        ("sets", {f"set-{i}": {"nlu": 1.0} for i in range(4097)}, "sets"),
    ],
)
def test_inconsistent_statistics_and_named_sets_are_named(path, value, field):
    error = refusal(changed(path, value, data=EXTENDED_DATA))
    assert isinstance(error, CorruptCheckpoint)
    assert fields(error) == {field}, str(error)
    assert len(str(error)) < 500 and str(error).isprintable()


def test_the_largest_statistics_and_weights_are_accepted():
    assert manifests.parse(changed("tasks/0/statistics/bytes", LARGEST, data=EXTENDED_DATA), PATH)
    read = manifests.parse(changed("sets/support", {"nlu": -16, "math": 0}, data=EXTENDED_DATA), PATH)
    assert str(read.named_set("support")) == "nlu:-16.0"


@given(JSON_VALUES | st.dictionaries(st.text(max_size=4), st.dictionaries(st.sampled_from("ab"), JSON_VALUES)))
def test_any_named_sets_are_refused_or_can_be_used(value):
    try:
        read = manifests.parse(changed("sets", value, data=EXTENDED_DATA), PATH)
    except CorruptCheckpoint as error:
        assert all(field.startswith("sets") for field in fields(error)), str(error)
    else:
        assert all(read.named_set(name).names in ((), ("math",), ("nlu",), ("math", "nlu")) for name in read.sets)


@given(JSON_VALUES)
def test_any_statistics_are_refused_by_name_or_none(value):
    data = changed("tasks/0/statistics", value, data=EXTENDED_DATA)
    if value is None:
        assert manifests.parse(data, PATH).task("math").statistics is None
    else:
        assert all(field.startswith("tasks[0].statistics") for field in fields(refusal(data)))


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (
            "tasks/0/statistics",
            {"path": "statistics/math.safetensors", "bytes": 1, "sha256": ""},
            "tasks[0].statistics",
        ),
        ("tasks/1/statistics", None, "tasks[1].statistics"),
        ("sets", {"support": {"math": 1.0}}, "sets"),
        ("sets", {}, "sets"),
    ],
)
def test_version_1_has_neither_statistics_nor_named_sets(path, value, field):
    error = refusal(changed(path, value))
    assert fields(error) == {field} and "is not a known field" in str(error)


def test_all_mistakes_are_named_at_once():
    content = json.loads(DATA)
    content["rank"] = "4"
    content["base_model"]["name"] = None
    content["tasks"][0]["alpha"] = []
    content["tasks"][1]["extra"] = 0
    assert fields(refusal(signed(content))) == {"rank", "base_model.name", "tasks[0].alpha", "tasks[1].extra"}
    content = json.loads(DATA)
    content["projection"]["init_std"] = -1.0
    content["tasks"][0]["dtype"] = "int8"
    content["tasks"][1]["sparsity"] = 1.5
    assert fields(refusal(signed(content))) == {"projection.init_std", "tasks[0].dtype", "tasks[1].sparsity"}


def test_a_wrong_adapter_digest_is_refused():
    content = json.loads(DATA)
    content["adapter_digest"] = "0" * 64
    del content["digest"]
    data = json.dumps(content | {"digest": sha256_of(content)}).encode()
    assert fields(refusal(data)) == {"adapter_digest"}


def test_the_helper_signs_as_the_writer_does():
    """Otherwise the tests above could pass for the wrong reason."""
    assert json.loads(signed(json.loads(DATA))) == json.loads(DATA)
