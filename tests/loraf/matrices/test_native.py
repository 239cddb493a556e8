"""Every variant of the compiled library computes the bits and finds the faults that NumPy does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.matrices import native, projection, sparse
from loraf.matrices.sparse import SparseB, examine, index_dtype
from tests.loraf.conftest import compiled_library

HALVES = {torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


@pytest.fixture(scope="module", params=range(len(native.VARIANTS)), ids=native.VARIANTS)
def library(request) -> native.NativeLibrary:
    library = native.NativeLibrary(compiled_library().path, request.param)
    if library.variant != native.VARIANTS[request.param]:
        pytest.skip(f"this processor has no {native.VARIANTS[request.param]}")
    return library


# --- A ----------------------------------------------------------------------------------------------------------


def bits(values: np.ndarray) -> bytes:
    return values.shape, values.dtype, values.tobytes()


def by_numpy(seed: int, module: str, rows, columns, scale) -> np.ndarray:
    return projection._by_numpy(projection._Matrix("", seed, module, 0, 0, scale), rows, columns)


def by_library(library, seed: int, module: str, rows, columns, scale, dtype=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slice in float32 and in `dtype`, and checks that a margin around it stays untouched."""
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    size, margin = shape[0] * shape[1], 64
    out32 = np.full(size + 2 * margin, 7.5, dtype=np.float32)
    out16 = np.full(size + 2 * margin, 0x5A5A, dtype=np.uint16)
    key = projection.module_key(seed, module)
    half = out16[margin:].ctypes.data if dtype else None
    arguments = (projection.normal_table(), scale, key, rows, columns, out32[margin:].ctypes.data, half)
    library.projection(*arguments, HALVES.get(dtype, 0))
    for out, untouched in ((out32, 7.5), (out16, 0x5A5A)):
        assert (out[:margin] == untouched).all()
        assert (out[margin + size :] == untouched).all()
    return out32[margin:-margin].reshape(shape), out16[margin:-margin].reshape(shape)


SPANS = st.tuples(st.integers(0, 1200), st.integers(0, 700)).map(lambda pair: (pair[0], pair[0] + pair[1]))
ROWS = st.tuples(st.integers(0, 2**20), st.integers(0, 4)).map(lambda pair: (pair[0], pair[0] + pair[1]))
# From where float16 has only denormal numbers and zero up to where it has only infinity.
SCALES = st.one_of(st.sampled_from([1.0, 1e-3, 2e-5, 6e-8, 1e-20, 7e4, 1e20]), st.floats(1e-9, 1e6)).map(np.float32)


@settings(max_examples=150, deadline=None)
@given(st.integers(-(2**70), 2**70), st.text(max_size=5), ROWS, SPANS, SCALES, st.sampled_from([None, *HALVES]))
def test_the_library_computes_the_same_bits_of_a(library, seed, module, rows, columns, scale, dtype):
    expected = by_numpy(seed, module, rows, columns, scale)
    single, half = by_library(library, seed, module, rows, columns, scale, dtype)
    assert bits(single) == bits(expected)
    if dtype:
        rounded = torch.from_numpy(expected).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert bits(half) == bits(rounded)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_quantile_is_rounded_as_torch_does(library, dtype, monkeypatch):
    """The table covers all exponents, and ties in both directions."""
    words = np.arange(1 << 16, dtype=np.uint32)
    for low in (0, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x3000, 0x2FFF):
        table = (words << 16 | low).view(np.float32)
        table = np.where(np.isfinite(table), table, np.float32(0))
        monkeypatch.setattr(projection, "normal_table", lambda table=table: table)
        single, half = by_library(library, 0, "m", (0, 64), (0, 4096), np.float32(1), dtype)
        rounded = torch.from_numpy(single).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert bits(half) == bits(rounded)
        assert len(np.unique(single)) > 60_000  # nearly every entry is used


def test_flushing_denormal_numbers_changes_nothing(library):
    expected = by_library(library, 0, "m", (0, 4), (0, 700), np.float32(3e-6), torch.float16)
    torch.set_flush_denormal(True)
    try:
        found = by_library(library, 0, "m", (0, 4), (0, 700), np.float32(3e-6), torch.float16)
    finally:
        torch.set_flush_denormal(False)
    assert [bits(part) for part in found] == [bits(part) for part in expected]


# --- masks ------------------------------------------------------------------------------------------------------


def slow_fault(b: SparseB) -> str | None:
    """Follows the definition, in plain Python."""
    d_out, rank = b.shape
    positions = list(zip(b.rows.tolist(), b.cols.tolist(), strict=True))
    if any(not 0 <= row < d_out for row, _ in positions):
        return "a row lies outside the matrix"
    if any(not 0 <= column < rank for _, column in positions):
        return "a column lies outside the matrix"
    if positions != sorted(set(positions)):
        return "coordinates are not unique and sorted by row, then column"
    if any(value != value or abs(value) == float("inf") for value in b.values.tolist()):
        return "a value is not finite"
    return None


def slow_shared(masks: list[SparseB]) -> bool:
    positions = [position for b in masks for position in zip(b.rows.tolist(), b.cols.tolist(), strict=True)]
    return len(positions) != len(set(positions))


def overwrite(tensor: torch.Tensor, index: int, value: int) -> None:
    limits = torch.iinfo(tensor.dtype)
    tensor[index] = max(limits.min, min(limits.max, value))


@st.composite
def modules(draw):
    """Masks of one to four tasks in one matrix, most of them damaged in one or two places, some overlapping."""
    shape = draw(
        st.sampled_from([(1, 1), (7, 3), (256, 4), (300, 16), (40, 300), (65_536, 1), (65_537, 2), (70_000, 3)])
    )
    size = shape[0] * shape[1]
    count = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Longer than a block of the compiled loop, if the matrix is large enough.
    share = draw(st.sampled_from([0, 1, 5, 40, 2047, 2048, 2049, 5000]))
    order = random.permutation(size)
    masks = []
    for task in range(count):
        positions = torch.from_numpy(order[task * share : (task + 1) * share].copy())
        dtype = draw(st.sampled_from(sparse.VALUE_DTYPES))
        values = torch.from_numpy(random.standard_normal(len(positions))).to(dtype)
        masks.append(SparseB.from_positions(positions, values, shape))
    for _ in range(draw(st.integers(0, 2))):
        b = draw(st.sampled_from(masks))
        if not len(b.values):
            continue
        at = draw(st.one_of(st.just(len(b.values) - 1), st.integers(0, len(b.values) - 1)))
        kind = draw(st.sampled_from(["swap", "repeat", "row", "column", "value", "steal"]))
        before = max(0, at - 1)
        if kind == "swap":
            for tensor in (b.rows, b.cols):
                tensor[at], tensor[before] = tensor[before].item(), tensor[at].item()
        elif kind == "repeat":
            b.rows[at], b.cols[at] = b.rows[before].item(), b.cols[before].item()
        elif kind in ("row", "column"):
            tensor, limit = (b.rows, shape[0]) if kind == "row" else (b.cols, shape[1])
            overwrite(tensor, at, draw(st.sampled_from([limit, limit - 1, -1, 0, 2**31 - 1, -(2**31)])))
        elif kind == "value":
            b.values[at] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-41, 6e4]))
        else:
            other = draw(st.sampled_from(masks))
            if len(other.values):
                b.rows[at], b.cols[at] = other.rows[0].item(), other.cols[0].item()
    return masks


@settings(max_examples=250, deadline=None)
@given(modules())
def test_the_library_reports_the_faults_of_the_slow_reference(library, masks):
    expected = [slow_fault(b) for b in masks]
    for with_and_without_library in (library, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                native, "library", lambda with_and_without_library=with_and_without_library: with_and_without_library
            )
            faults, shared = examine(masks)
            assert faults == expected
            assert [b.fault() for b in masks] == expected
        if not any(expected):
            assert shared == slow_shared(masks)


def test_the_random_masks_include_every_fault():
    """Otherwise the test above could pass for the wrong reason."""
    seen = set()

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(modules())
    def collect(masks):
        faults = [slow_fault(b) for b in masks]
        seen.update(faults)
        if not any(faults):
            seen.add(slow_shared(masks))

    collect()
    assert seen == {None, True, False, *sparse._FAULTS.values()}


@pytest.mark.parametrize("dtype", sparse.VALUE_DTYPES)
def test_every_16_bit_value_is_classified_correctly(library, dtype):
    words = torch.arange(1 << 16, dtype=torch.int32)
    raw = (words << 16) if dtype == torch.float32 else words.to(torch.int16)
    values = raw.view(dtype)
    for value, finite in zip(values.split(1), torch.isfinite(values).tolist(), strict=True):
        zero = torch.zeros(1, dtype=torch.uint8)
        mask = native.Mask(zero.data_ptr(), zero.data_ptr(), value.data_ptr(), 1, sparse._VALUE_KINDS[dtype])
        assert library.check_masks([mask], (1, 1), (1, 1)) == ([0 if finite else 8], False)


def test_matrices_with_more_than_32_bit_positions_use_numpy():
    assert native.can_check((1 << 16, 1 << 16))
    assert not native.can_check((1 << 16, (1 << 16) + 1))
    assert not native.can_check((1 << 31 | 1, 1))
    assert not native.can_check((0, 4))
    rows = torch.tensor([69_999, 0], dtype=torch.int32)
    b = SparseB(rows, torch.tensor([69_999, 5], dtype=torch.int32), torch.ones(2), (70_000, 70_000))
    assert index_dtype(70_000) == torch.int32
    assert "not unique and sorted" in b.fault()


# --- loading ----------------------------------------------------------------------------------------------------


def test_an_environment_variable_disables_the_library():
    code = "from loraf.matrices import native; print(native.library(), native.why_not())"
    environment = os.environ | {native.SWITCH: "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "None LORAF_NATIVE=0 disables it", run.stderr


def test_the_reason_names_a_library_that_cannot_be_used(tmp_path, monkeypatch):
    good = compiled_library().path
    (tmp_path / "_native.so").write_bytes(b"no library")
    with pytest.raises(native.Unusable, match=r"_native\.so cannot be loaded"):
        native.NativeLibrary(tmp_path / "_native.so")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(native.Unusable, match="was built from other sources"):
        native.NativeLibrary(good)
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(native.Unusable, match="big-endian"):
        native.NativeLibrary(good)


def test_the_newest_usable_library_is_loaded(tmp_path, monkeypatch):
    good = compiled_library().path
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._load.cache_clear()
    try:
        assert native.library() is None
        assert "was not built" in native.why_not()
        native._load.cache_clear()
        shutil.copy(good, tmp_path / "_native.old.so")
        (tmp_path / "_native.new.so").write_bytes(b"half a library")
        assert native.library().path == tmp_path / "_native.old.so"
        assert native.why_not() is None
    finally:
        native._load.cache_clear()
