"""The packed layer, read back in NumPy as csrc/layer.h describes it: complete, exact, with little padding."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings

from loraf_serve.kernels.cpu_kernel import NativeOperand
from tests.loraf_serve.kernel_cases import Case, cases, make_case, needs_native, numbers

pytestmark = needs_native

BLOCK, WINDOW, DEPTH, UNIT = 16, 256, 512, 16
LAYER = np.dtype(
    [(name, "<i8") for name in ("nbytes", "d_in", "tasks", "parts", "blocks", "rank", "a")]
    + [("kind", "<i4"), ("reserved", "<i4")]
)
PART = np.dtype(
    [(name, "<i8") for name in ("rank", "first_block", "d_out", "offset", "sheets", "b")]
    + [("value_kind", "<i4"), ("index_bytes", "<i4")]
)


def floats(raw: np.ndarray, kind: int) -> np.ndarray:
    """bfloat16 (0), float16 (1) or float32 (2) bytes as float64."""
    if kind == 2:
        return raw.view("<f4").astype(np.float64)
    halves = torch.from_numpy(raw.view("<i2").copy())
    return numbers(halves.view(torch.bfloat16 if kind == 0 else torch.float16))


def read_head(memory: np.ndarray) -> tuple[np.void, np.ndarray]:
    layer = memory[: LAYER.itemsize].view(LAYER)[0]
    return layer, memory[LAYER.itemsize : LAYER.itemsize + int(layer["parts"]) * PART.itemsize].view(PART)


def read_a(memory: np.ndarray, layer: np.void, kind: int) -> np.ndarray:
    """Returns A of all parts including padding rows, (blocks · 16, d_in)."""
    size, pair = (4 if kind == 2 else 2), (2 if kind == 0 else 1)
    at, d_in, blocks = int(layer["a"]), int(layer["d_in"]), int(layer["blocks"])
    tiles = []
    for k0 in range(0, d_in, DEPTH):
        depth = min(DEPTH, d_in - k0)
        columns = -(-depth // pair)
        count = blocks * columns * BLOCK * pair
        tile = floats(memory[at : at + count * size], kind).reshape(blocks, columns, BLOCK, pair)
        at += count * size
        tile = tile.transpose(0, 2, 1, 3).reshape(blocks * BLOCK, columns * pair)
        assert not tile[:, depth:].any()
        tiles.append(tile[:, :depth])
    return np.concatenate(tiles, axis=1)


def read_sheet(sheet: np.ndarray, outputs: int, part: np.void) -> tuple[list[tuple[int, int, float]], int]:
    """Returns (row within the window, column, value) of each nonzero, and the number of cells including padding."""
    slices = -(-outputs // BLOCK)
    rows = sheet[: slices * BLOCK]
    assert sorted(rows.tolist()) == list(range(slices * BLOCK))
    lengths = sheet[slices * BLOCK :][: 2 * slices].view("<u2")
    assert (np.diff(lengths.astype(int)) <= 0).all()  # the longest first
    values, columns = (4 if part["value_kind"] == 2 else 2) * BLOCK, int(part["index_bytes"]) * BLOCK
    steps = sheet[slices * BLOCK + -(-2 * slices // UNIT) * UNIT :].reshape(int(lengths.sum()), values + columns)
    nonzeros, at = [], 0
    for s, length in enumerate(lengths.tolist()):
        for step in steps[at : at + length]:
            value = floats(step[:values], int(part["value_kind"]))
            j = step[values:].view("<u1" if part["index_bytes"] == 1 else "<u2")
            nonzeros += [(int(rows[s * BLOCK + i]), int(j[i]), value[i]) for i in range(BLOCK) if value[i] or j[i]]
            assert not any(value[i] and rows[s * BLOCK + i] >= outputs for i in range(BLOCK))
        at += length
    return nonzeros, len(steps) * BLOCK


def read_b(memory: np.ndarray, part: np.void, tasks: int) -> tuple[list[dict[tuple[int, int], float]], int]:
    """Returns (row, column) → value of each task, and the number of cells."""
    d_out = int(part["d_out"])
    windows = -(-d_out // WINDOW)
    begins = memory[int(part["sheets"]) :][: 4 * (windows * tasks + 1)].view("<u4").astype(np.int64) * UNIT
    b_of_tasks: list[dict[tuple[int, int], float]] = [{} for _ in range(tasks)]
    cells = 0
    for i, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        window, t = divmod(i, tasks)
        if begin == end:
            continue
        first = window * WINDOW
        sheet = memory[int(part["b"]) + begin : int(part["b"]) + end]
        nonzeros, count = read_sheet(sheet, min(WINDOW, d_out - first), part)
        cells += count
        for row, column, value in nonzeros:
            assert (first + row, column) not in b_of_tasks[t]
            b_of_tasks[t][first + row, column] = value
    return b_of_tasks, cells


def assert_packed(case: Case) -> tuple[int, int]:
    """Returns the numbers of nonzeros and cells."""
    operand = NativeOperand(case.parts)
    memory = operand._memory.numpy()
    layer, parts = read_head(memory)
    kind = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[case.x.dtype]
    assert (layer["nbytes"], layer["kind"]) == (operand.nbytes, kind)
    a = read_a(memory, layer, kind)
    nonzeros = cells = 0
    for part, packed in zip(case.parts, parts, strict=True):
        first = int(packed["first_block"]) * BLOCK
        padded = -(-part.rank // BLOCK) * BLOCK
        assert np.array_equal(a[first : first + part.rank], numbers(part.a))
        assert not a[first + part.rank : first + padded].any()
        b_of_tasks, part_cells = read_b(memory, packed, len(part.tasks))
        cells += part_cells
        for b, unpacked in zip(part.tasks, b_of_tasks, strict=True):
            rows, cols, values = b.rows.numpy().astype(int), b.cols.numpy().astype(int), numbers(b.values)
            kept = (rows >= part.first_row) & (rows < part.stop_row)
            # A stored zero in column 0 is indistinguishable from padding, and equivalent to it.
            expected = {
                (r - part.first_row, c): v
                for r, c, v in zip(rows[kept].tolist(), cols[kept].tolist(), values[kept], strict=True)
                if v or c
            }
            assert unpacked == expected
            nonzeros += int(kept.sum())
    return nonzeros, cells


# A case draws whole matrices, which takes a slow machine longer than the health check allows.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(most_rows=1))
def test_a_packed_layer_holds_exactly_the_parts(case):
    assert_packed(case)


def test_padding_at_the_usual_sparsity_is_small():
    """With a tenth of the positions for each task and rank 64, whole windows have 6.6 % more cells than nonzeros."""
    nonzeros, cells = assert_packed(make_case(0, shapes=((64, 4096),), tasks=2, n=1))
    assert cells <= 1.08 * nonzeros


def test_two_workers_together_hold_the_whole_b():
    whole = make_case(3, shapes=((32, 600),), tasks=3, n=1)
    halves = [make_case(3, shapes=((32, 600),), tasks=3, n=1) for _ in range(2)]
    total = 0
    for half, (first, stop) in zip(halves, ((0, 300), (300, 600)), strict=True):
        part = half.parts[0]
        half.parts = [type(part)(part.a, part.tasks, first, stop, 0)]
        total += assert_packed(half)[0]
    assert total == sum(len(b.values) for b in whole.parts[0].tasks)
