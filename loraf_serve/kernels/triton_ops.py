"""The two products of a delta on a GPU: `shrink`, then `expand`. Everything that can change between steps is read from
device memory, so a CUDA graph captured once serves any task sets, and adapters that were loaded after the capture.

    entries of a step: groups of rows that one adapter acts on (see `DeviceWeights`)

    shrink      z[s, at + i]  = Σ_(k in split s) A[k] x[row_i, k]                           for every entry, row i of it
    expand      y[row_i, o]  += Σ_t  w[i, t] Σ_(j: owner[o, j] = t)  B[o, j] Σ_s z[s, at + i, j]

B is (outputs, rank) and holds all tasks. For every TASKS tasks there is also a plane of the same shape: at each
position the bit of the task that owns it. (A task number would work, but comparing 32 of them takes so many registers
that few programs fit.) Tasks that have equal weights in every row of an entry share one product; tasks of weight zero
take none.

Products of 16-bit numbers run on the tensor cores. z is a float32 sum: TERMS 3 passes on all of its 24 bits as three
bfloat16 numbers of 8 bits, TERMS 2 passes on two of them, TERMS 1 one. Splits of a sum are added in a fixed order, so
the same step gives the same bits. (No product accumulates into another's result: Triton would lay out such a chain as
in attention, with every warp doing the whole work and registers spilling.)

An entry is ENTRY int32 numbers: the adapter's index in the table, the number of rows, the offset of its row indices,
its first row of z, the offset of its groups of tasks, their number, the offset of their weights, and the stride between
two rows' weights (0 if all are equal). A group is a plane and the bits in it. A record of the adapter table is RECORD
int64 numbers: the addresses of A, B and the planes, rows of A, rank. A tile is TILE int32 numbers: its first column of
y, its outputs, its band (see `Layer`), its first row of B.

The time goes into chains of dependent loads. So the first entry is loaded together with the number of entries, and
tiles do not depend on the adapter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton compiles these functions from a language of its own, in which arguments have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

ENTRY, RECORD, TILE = 8, 8, 4
_ENTRY, _RECORD, _TILE = tl.constexpr(ENTRY), tl.constexpr(RECORD), tl.constexpr(TILE)
TASKS = 16  # of a plane
# Triton's interpreter would multiply the bits of bfloat16 numbers as integers.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _product(total, a, b):
    if _INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def shrink(
    x,  # (n, d_in)
    x_stride,
    d_in,
    z,  # (splits, rows, width) float32
    z_split,
    z_stride,
    step,  # int32, the memory of `DeviceWeights`
    records,  # (adapters, RECORD) int64
    span,  # columns of a split, a multiple of COLUMNS
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,  # lets the next kernel start with the part that does not depend on this one
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    programs = tl.num_programs(0)
    split = tl.program_id(2)
    begin = split * span
    stop = tl.minimum(begin + span, d_in)
    lanes = tl.arange(0, ROWS)
    low = tl.program_id(1) * RANKS
    j = low + tl.arange(0, RANKS)
    entries = tl.load(step)
    entry = step + 1
    adapter, count = tl.load(entry), tl.load(entry + 1)
    rows_at, z_first = tl.load(entry + 2), tl.load(entry + 3)
    before = 0  # tiles of rows in previous entries
    for _ in range(entries):
        record = records + adapter * _RECORD
        a = tl.multiple_of(tl.load(record).to(tl.pointer_type(x.dtype.element_ty)), 16)
        width = tl.load(record + 3).to(tl.int32)
        first = (tl.program_id(0) + programs - before % programs) % programs
        if low < width:
            for at in range(first * ROWS, count, programs * ROWS):
                inside = at + lanes < count
                row = tl.load(step + rows_at + at + lanes, mask=inside, other=0).to(tl.int64)
                x_rows = x + row[:, None] * x_stride
                a_rows = a + j[None, :].to(tl.int64) * d_in
                total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
                for k in range(begin, stop, COLUMNS):
                    column = k + tl.arange(0, COLUMNS)
                    in_range = column < d_in
                    x_tile = tl.load(x_rows + column[None, :], mask=inside[:, None] & in_range[None, :], other=0.0)
                    a_tile = tl.load(a_rows + column[:, None], mask=in_range[:, None] & (j < width)[None, :], other=0.0)
                    total = _product(total, x_tile, a_tile)
                target = z + split * z_split + (z_first + at + lanes)[:, None] * z_stride + j[None, :]
                tl.store(target, total, mask=inside[:, None] & (j < width)[None, :])
        before += tl.cdiv(count, ROWS)
        entry += _ENTRY
        adapter, count = tl.load(entry), tl.load(entry + 1)
        rows_at, z_first = tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def gather(z, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Adds the splits into the first one, because `expand` reads z in every tile of outputs."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.load(z + at, mask=valid, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(z + s * size + at, mask=valid, other=0.0)
    tl.store(z + at, total, mask=valid)


@triton.jit
def _times(z, b, TERMS: tl.constexpr):
    """z bᵀ in float32; z (rows, ranks) float32, b (outputs, ranks) bfloat16."""
    transposed = tl.trans(b)
    zeros = tl.zeros((z.shape[0], b.shape[0]), dtype=tl.float32)
    high = z.to(tl.bfloat16)
    total = _product(zeros, high, transposed)
    if TERMS > 1:
        remainder = z - high.to(tl.float32)
        middle = remainder.to(tl.bfloat16)
        total += _product(zeros, middle, transposed)
        if TERMS > 2:
            total += _product(zeros, (remainder - middle.to(tl.float32)).to(tl.bfloat16), transposed)
    return total


@triton.jit
def _expanded(z, b, TERMS: tl.constexpr):
    """z bᵀ in float32; z (rows, ranks) float32, b (outputs, ranks)."""
    if b.dtype == tl.float32:
        total = _product(tl.zeros((z.shape[0], b.shape[0]), dtype=tl.float32), z, tl.trans(b))
    elif b.dtype == tl.bfloat16:
        total = _times(z, b, TERMS)
    else:  # z may exceed float16's range; a float16 number is exactly the sum of two bfloat16 numbers
        high = b.to(tl.bfloat16)
        total = _times(z, high, TERMS) + _times(z, (b.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), TERMS)
    return total


@triton.jit
def expand(
    y,  # (n, columns)
    y_stride,
    z,
    z_split,
    z_stride,
    step,
    floats,  # the memory of `step` as float32, for the weights
    records,
    tiles,  # (tiles, TILE) int32
    height,  # rows of B
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of RANKS ranks each; together they cover the largest rank
    ONCE: tl.constexpr,  # one chunk and one plane of tasks: a tile of B stays in registers
    SPLITS: tl.constexpr,
    TERMS: tl.constexpr,
    ALIGNED: tl.constexpr,  # tiles begin at multiples of 16
    EARLY: tl.constexpr,
):
    programs = tl.num_programs(1)
    lanes = tl.arange(0, ROWS)
    out = tl.arange(0, OUTPUTS)
    tile = tiles + tl.program_id(0) * _TILE
    column, outputs = tl.load(tile), tl.load(tile + 1)
    band, b_first = tl.load(tile + 2), tl.load(tile + 3)
    if ALIGNED:
        column = tl.multiple_of(column, 16)
    valid = out < outputs
    entries = tl.load(step)
    entry = step + 1
    adapter, count = tl.load(entry), tl.load(entry + 1)
    rows_at, z_first = tl.load(entry + 2), tl.load(entry + 3)
    groups_at, groups = tl.load(entry + 4), tl.load(entry + 5)
    weights_at, stride = tl.load(entry + 6), tl.load(entry + 7)
    before = 0
    for _ in range(entries):
        record = records + adapter * _RECORD
        b = tl.multiple_of(tl.load(record + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
        planes = tl.multiple_of(tl.load(record + 2).to(tl.pointer_type(tl.int16)), 16)
        rank = tl.multiple_of(tl.load(record + 4).to(tl.int32), 16)
        first = (tl.program_id(1) + programs - before % programs) % programs
        if rank > 0:
            if ONCE:
                j = tl.arange(0, RANKS)
                in_b = valid[:, None] & (j < rank)[None, :]
                positions = (b_first + out)[:, None] * rank + j[None, :]
                b_tile = tl.load(b + positions, mask=in_b, other=0.0)
                owners = tl.load(planes + positions, mask=in_b, other=0)
            for at in range(first * ROWS, count, programs * ROWS):
                i = at + lanes
                inside = i < count
                row = tl.load(step + rows_at + i, mask=inside, other=0).to(tl.int64)
                target = y + row[:, None] * y_stride + (column + out)[None, :]
                in_y = inside[:, None] & valid[None, :]
                total = tl.load(target, mask=in_y, other=0.0).to(tl.float32)
                plane, bits = tl.load(step + groups_at), tl.load(step + groups_at + 1)
                weight = tl.load(floats + weights_at + i * stride, mask=inside, other=0.0)
                for chunk in tl.static_range(CHUNKS):
                    j = chunk * RANKS + tl.arange(0, RANKS)
                    in_b = valid[:, None] & (j < rank)[None, :]
                    positions = (b_first + out)[:, None] * rank + j[None, :]
                    if not ONCE:
                        b_tile = tl.load(b + positions, mask=in_b, other=0.0)
                    if EARLY:
                        tl.extra.cuda.gdc_wait()
                    in_z = inside[:, None] & (j < rank)[None, :]
                    z_tile = z + (z_first + i)[:, None] * z_stride + (band * rank + j)[None, :]
                    shrunk = tl.load(z_tile, mask=in_z, other=0.0)
                    for s in tl.static_range(1, SPLITS):
                        shrunk += tl.load(z_tile + s * z_split, mask=in_z, other=0.0)
                    for g in range(groups):
                        if not ONCE:
                            plane_at = plane.to(tl.int64) * height * rank
                            owners = tl.load(planes + plane_at + positions, mask=in_b, other=0)
                        in_group = (owners & bits.to(tl.int16)) != 0
                        group_weight = weight
                        # Prefetches the next group; after the last one the first group, for the next chunk.
                        later = tl.where(g + 1 < groups, g + 1, 0)
                        plane, bits = tl.load(step + groups_at + 2 * later), tl.load(step + groups_at + 2 * later + 1)
                        weight = tl.load(floats + weights_at + i * stride + later, mask=inside, other=0.0)
                        total += group_weight[:, None] * _expanded(shrunk, tl.where(in_group, b_tile, 0.0), TERMS)
                tl.store(target, total.to(y.dtype.element_ty), mask=in_y)
        before += tl.cdiv(count, ROWS)
        entry += _ENTRY
        adapter, count = tl.load(entry), tl.load(entry + 1)
        rows_at, z_first = tl.load(entry + 2), tl.load(entry + 3)
        groups_at, groups = tl.load(entry + 4), tl.load(entry + 5)
        weights_at, stride = tl.load(entry + 6), tl.load(entry + 7)
    if EARLY:  # even without entries: the kernel after this one must not start before `shrink` has ended
        tl.extra.cuda.gdc_wait()
