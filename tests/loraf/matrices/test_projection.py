"""A has the bits of a slow integer reference, whatever the slice, the chunk size and the number of threads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.matrices import native, projection
from tests.loraf.vectors import slow_projection

VECTORS = json.loads((slow_projection.HERE / "projection.json").read_text(encoding="utf-8"))
QUANTILES = slow_projection.table()

pytestmark = pytest.mark.usefixtures("with_and_without_library")

# Random123, tests/kat_vectors: counter, key, result of philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, result):
    column = np.array(words(counter), dtype=np.uint32).reshape(4, 1)
    assert tuple(projection.philox4x32(column, words(key))[:, 0]) == words(result)
    assert slow_projection.philox4x32_10(words(counter), words(key)) == words(result)


def test_philox_does_not_change_its_argument_and_treats_columns_alike():
    counter = np.array([words(c) for c, _, _ in KNOWN_ANSWERS], dtype=np.uint64).T
    before = counter.copy()
    together = projection.philox4x32(counter, (7, 0xFFFFFFFF))
    assert (counter == before).all()
    for i in range(counter.shape[1]):
        assert tuple(together[:, i]) == slow_projection.philox4x32_10(
            tuple(int(w) for w in counter[:, i]), (7, 0xFFFFFFFF)
        )


# --- the table --------------------------------------------------------------------------------------------------


def test_table_is_the_committed_one_and_is_checked(monkeypatch):
    assert hashlib.sha256(projection.normal_table().tobytes()).hexdigest() == projection.TABLE_SHA256
    assert VECTORS["table_sha256"] == projection.TABLE_SHA256
    projection.normal_table.cache_clear()
    monkeypatch.setattr(projection, "TABLE_SHA256", "0" * 64)
    try:
        with pytest.raises(RuntimeError, match=r"normal_quantiles\.f32 has been changed"):
            projection.normal_table()
    finally:
        projection.normal_table.cache_clear()


def test_table_is_increasing_symmetric_and_cannot_be_changed():
    table = projection.normal_table()
    assert table.shape == (65536,)
    assert table.dtype == np.float32
    assert (np.diff(table) > 0).all()
    assert (table == -table[::-1]).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


def test_table_holds_the_midpoint_quantiles_rounded_once():
    """By mpmath's inverse error function, each entry is the float32 nearest to the exact quantile."""
    table = projection.normal_table()
    picked = {0, 1, 2, 32766, 32767, 32768, 65533, 65535, *range(113, 65536, 641)}
    with mpmath.workdps(40):
        for k in picked:
            exact = mpmath.sqrt(2) * mpmath.erfinv(2 * (mpmath.mpf(k) + mpmath.mpf("0.5")) / 65536 - 1)
            here = table[k]
            error = abs(mpmath.mpf(float(here)) - exact)
            for neighbour in (np.nextafter(here, np.float32(-9)), np.nextafter(here, np.float32(9))):
                assert error <= abs(mpmath.mpf(float(neighbour)) - exact), k


def test_table_has_the_moments_of_a_standard_normal():
    table = projection.normal_table().astype(np.float64)
    assert table.mean() == 0
    assert table.std() == pytest.approx(1, abs=1e-4)
    assert (table**4).mean() == pytest.approx(3, abs=2e-2)


# --- A against the slow reference -------------------------------------------------------------------------------


def slow(seed: int, module: str, rank: int, d_in: int, std: float | None = None) -> np.ndarray:
    return np.array(slow_projection.matrix(QUANTILES, seed, module, rank, d_in, std), dtype=np.float32)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


SEEDS = st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70))
NAMES = st.one_of(
    st.sampled_from(["model.layers.0.self_attn.q_proj", "lm_head"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
STDS = st.one_of(st.none(), st.floats(1e-6, 10))


@settings(max_examples=60, deadline=None)
@given(SEEDS, NAMES, st.integers(1, 9), st.integers(1, 40), STDS)
def test_projection_equals_the_slow_reference(seed, module, rank, d_in, std):
    assert same_bits(projection.projection(seed, module, rank, d_in, std), slow(seed, module, rank, d_in, std))


def slices(size: int):
    bound = st.one_of(st.none(), st.integers(-size - 2, size + 2))
    return st.builds(slice, bound, bound, st.sampled_from([None, 1]))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(-5, 5), st.integers(1, 12), st.integers(1, 50))
def test_a_slice_computed_alone_equals_the_slice_of_the_whole(data, seed, rank, d_in):
    rows, columns = data.draw(slices(rank)), data.draw(slices(d_in))
    whole = projection.projection(seed, "m", rank, d_in)
    part = projection.projection(seed, "m", rank, d_in, rows=rows, columns=columns)
    assert same_bits(part, np.ascontiguousarray(whole[rows, columns]))
    assert part.flags.c_contiguous


@pytest.mark.parametrize("where", ["rows", "columns"])
@pytest.mark.parametrize("step", [2, -1])
def test_a_slice_with_another_step_is_refused(where, step):
    with pytest.raises(ValueError, match="step 1"):
        projection.projection(0, "m", 4, 4, **{where: slice(None, None, step)})


def test_a_row_depends_neither_on_the_rank_nor_on_the_width():
    """Only the scale depends on the width, through the default standard deviation."""
    large = projection.projection(3, "m", 16, 64, std=1.0)
    assert same_bits(projection.projection(3, "m", 5, 13, std=1.0), np.ascontiguousarray(large[:5, :13]))


def test_distant_positions_are_computed_alone():
    """Row and column counters exceed 16 bits. The matrix is not computed."""
    rank, d_in = 70_001, 600_007
    a = projection.projection(5, "m", rank, d_in, 1.0, slice(70_000, None), slice(600_000, None))
    expected = [slow_projection.entry(QUANTILES, 5, "m", 70_000, column, 1.0) for column in range(600_000, d_in)]
    assert a.tolist() == [expected]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64, 1 << 20])
def test_chunks_do_not_change_a_bit(monkeypatch, at_once):
    expected = projection.projection(11, "m", 13, 57)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(projection, "_BLOCKS_AT_ONCE", at_once)
    assert same_bits(projection.projection(11, "m", 13, 57), expected)


def test_threads_do_not_change_a_bit():
    modules = {f"model.layers.{i}.mlp.up_proj": (8, 50 + i) for i in range(24)}
    alone = {name: projection.digest(projection.projection(9, name, 6, d_in)) for name, (_, d_in) in modules.items()}
    gathered: list[dict] = []
    projection.forget_digests()
    threads = [threading.Thread(target=lambda: gathered.append(projection.digests(9, 6, modules))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gathered == [alone] * 4
    assert list(gathered[0]) == list(modules)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.text(max_size=3)), min_size=2, max_size=6, unique=True))
def test_no_two_seeds_or_modules_share_a_key(pairs):
    assert len({projection.module_key(seed, module) for seed, module in pairs}) == len(pairs)


# --- in other dtypes, and its digest ----------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 700, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_and_its_digest_in_one_pass(monkeypatch, dtype, at_once):
    monkeypatch.setattr(projection, "_NUMBERS_AT_ONCE", at_once)
    a = projection.projection(3, "m", 7, 333)
    projection.forget_digests()
    for _ in range(2):  # the second time the digest is cached
        rounded, digest = projection.projection_and_digest(3, "m", 7, 333, dtype=dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, torch.from_numpy(a).to(dtype))
        assert digest == projection.digest(a)
    projection.forget_digests()
    assert projection.digest_of(3, "m", 7, 333) == projection.digest(a)


def test_a_digest_is_cached_under_everything_that_it_depends_on(monkeypatch):
    made = []
    fill = projection._fill
    monkeypatch.setattr(projection, "_fill", lambda *arguments: made.append(arguments[0]) or fill(*arguments))
    projection.forget_digests()
    cases = [(0, "m", 2, 9, 0.5), (1, "m", 2, 9, 0.5), (0, "n", 2, 9, 0.5), (0, "m", 3, 9, 0.5), (0, "m", 2, 8, 0.5)]
    cases += [(0, "m", 2, 9, 0.25), (0, "m", 2, 9, None)]
    found = [projection.digest_of(*case) for case in cases]
    assert len(set(found)) == len(made) == len(cases)
    assert [projection.digest_of(*case) for case in cases] == found
    assert projection.digest_of(0, "m", 2, 9, projection.default_std(9)) == found[-1]  # the same number, written out
    assert len(made) == len(cases)


def test_the_cache_of_digests_is_bounded(monkeypatch):
    projection.forget_digests()
    monkeypatch.setattr(projection, "_KNOWN_DIGESTS", 3)
    for seed in range(9):
        projection.digest_of(seed, "m", 1, 1)
    assert [matrix.seed for matrix in projection._digests] == [6, 7, 8]


# --- test vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: f"{v['seed']}-{v['rank']}x{v['d_in']}")
def test_projection_equals_the_committed_vectors(vector):
    a = projection.projection(vector["seed"], vector["module"], vector["rank"], vector["d_in"], vector["std"])
    assert projection.digest(a) == vector["sha256"]
    assert [float(value).hex() for value in a[0, :8]] == vector["first_row"]
    assert [float(value).hex() for value in a[-1, :8]] == vector["last_row"]


def test_the_committed_vectors_equal_the_reference():
    assert VECTORS["generator"] == projection.GENERATOR
    assert [slow_projection.vector(QUANTILES, case) for case in slow_projection.CASES] == VECTORS["vectors"]


def test_combined_digest_by_hand():
    text = b"a.x 11\nb 22\n"
    assert projection.combined_digest({"b": "22", "a.x": "11"}) == hashlib.sha256(text).hexdigest()


def test_digest_is_over_little_endian_rows_whatever_the_memory_order():
    a = projection.projection(0, "m", 4, 6)
    assert projection.digest(np.asfortranarray(a)) == projection.digest(a) == hashlib.sha256(a.tobytes()).hexdigest()
    assert projection.digest(a.astype(">f4")) == projection.digest(a)


# --- statistics -------------------------------------------------------------------------------------------------


def test_default_standard_deviation_is_that_of_pefts_lora():
    """PEFT initializes A with torch's kaiming_uniform_(a=√5), whose variance is 1/(3·d_in)."""
    torch.manual_seed(0)
    weight = torch.empty(256, 1024)
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    assert projection.default_std(1024) == pytest.approx(float(weight.std()), rel=5e-3)


def test_numbers_are_normal_and_rows_and_modules_uncorrelated():
    rank, d_in = 64, 4096
    a = projection.projection(0, "model.layers.0.self_attn.q_proj", rank, d_in, 1.0).astype(np.float64)
    b = projection.projection(0, "model.layers.0.self_attn.k_proj", rank, d_in, 1.0).astype(np.float64)
    c = projection.projection(1, "model.layers.0.self_attn.q_proj", rank, d_in, 1.0).astype(np.float64)
    n = rank * d_in
    # Five standard errors: of the mean 1/√n, of the standard deviation 1/√(2n), of a correlation of rows 1/√d_in.
    for matrix in (a, b, c):
        assert abs(matrix.mean()) < 5 / math.sqrt(n)
        assert abs(matrix.std() - 1) < 5 / math.sqrt(2 * n)
        rows = np.corrcoef(matrix) - np.eye(rank)
        assert np.abs(rows).max() < 5.5 / math.sqrt(d_in)
        lanes = np.corrcoef(matrix.reshape(-1, projection.LANES).T) - np.eye(projection.LANES)
        assert np.abs(lanes).max() < 5.5 / math.sqrt(n / projection.LANES)
    for left, right in ((a, b), (a, c), (b, c)):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / math.sqrt(n)
    # Kolmogorov-Smirnov distance to Φ; 1.95/√n is passed with probability 0.999.
    table = np.searchsorted(np.sort(a.ravel()), [-2.0, -1.0, 0.0, 0.5, 1.5]) / n
    phi = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (-2.0, -1.0, 0.0, 0.5, 1.5)]
    assert np.abs(table - phi).max() < 1.95 / math.sqrt(n)


def test_flushing_denormal_numbers_changes_nothing():
    """A torch setting of the process that changes float arithmetic near zero."""
    expected = projection.projection(0, "m", 8, 64)
    on = torch.set_flush_denormal(True)
    try:
        assert same_bits(projection.projection(0, "m", 8, 64), expected)
    finally:
        torch.set_flush_denormal(False)
    assert on or os.uname().machine not in {"x86_64", "aarch64"}
