"""The two products of a delta on a GPU: `shrink`, then `expand`. Every number that a step may change is read from
memory of the device, so that a CUDA graph captured once serves any task sets, and adapters that were loaded after it.

    entries of a step: runs of rows that one adapter acts on (see `DeviceRows`)

    shrink      z[s, at + i]  = Σ_(k in split s) A[k] x[row_i, k]                           for every entry, row i of it
    expand      y[row_i, o]  += Σ_t  w[i, t] Σ_(j: owner[o, j] = t)  B[o, j] Σ_s z[s, at + i, j]

B stands as (outputs, rank) with all tasks in it. Beside it, for every TASKS tasks, stands a plane of the same shape: at
each position the bit of the task that owns it. (A number would do, but to compare 32 of them takes so many registers
that few programs fit.) Tasks that have the same weight in every row of an entry are one product, those of weight zero
none.

Products of 16-bit numbers go to the tensor cores. z is a float32 sum: TERMS 3 gives them all of its 24 bits, in three
bfloat16 numbers of 8, TERMS 2 two of these, TERMS 1 one. Splits of a sum are added in one order: the same step gives
the same bits. (No product adds to another's result: Triton lays out such a chain as in attention, each warp does the
work of all, and registers spill.)

An entry is ENTRY int32 numbers: slot, rows, where its row numbers stand, the first row of z, where its groups of tasks
stand, how many, where their weights stand, how far a row's weights are from the last row's (0: all the same). A group
is a plane and bits in it. A slot of a layer is SLOT int64 numbers: the addresses of A, B and the planes, rows of A,
rank. A tile is TILE int32 numbers: its first column of y, its outputs, its band (see `Layer`), its first row of B.

Time goes into waiting for memory, one thing that says where the next is: so what the first entry says is asked for
together with the number of entries, and tiles do not depend on the adapter.
"""

from __future__ import annotations

import triton
import triton.language as tl

ENTRY, SLOT, TILE = 8, 8, 4
_ENTRY, _SLOT, _TILE = tl.constexpr(ENTRY), tl.constexpr(SLOT), tl.constexpr(TILE)
TASKS = 16  # of a plane
# Triton's interpreter multiplies the bits of bfloat16 numbers as integers.
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
    step,  # int32: entries, then row numbers
    slots,  # (slots, SLOT) int64
    span,  # columns of a split, a multiple of COLUMNS
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,  # the next kernel may begin with what does not depend on this one
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
    slot, count = tl.load(entry), tl.load(entry + 1)
    order, z_first = tl.load(entry + 2), tl.load(entry + 3)
    before = 0  # tiles of rows in the entries before
    for _ in range(entries):
        fields = slots + slot * _SLOT
        a = tl.multiple_of(tl.load(fields).to(tl.pointer_type(x.dtype.element_ty)), 16)
        width = tl.load(fields + 3).to(tl.int32)
        first = (tl.program_id(0) + programs - before % programs) % programs
        if low < width:
            for at in range(first * ROWS, count, programs * ROWS):
                inside = at + lanes < count
                row = tl.load(step + order + at + lanes, mask=inside, other=0).to(tl.int64)
                x_rows = x + row[:, None] * x_stride
                a_rows = a + j[None, :].to(tl.int64) * d_in
                total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
                for k in range(begin, stop, COLUMNS):
                    column = k + tl.arange(0, COLUMNS)
                    kept = column < d_in
                    given = tl.load(x_rows + column[None, :], mask=inside[:, None] & kept[None, :], other=0.0)
                    basis = tl.load(a_rows + column[:, None], mask=kept[:, None] & (j < width)[None, :], other=0.0)
                    total = _product(total, given, basis)
                place = z + split * z_split + (z_first + at + lanes)[:, None] * z_stride + j[None, :]
                tl.store(place, total, mask=inside[:, None] & (j < width)[None, :])
        before += tl.cdiv(count, ROWS)
        entry += _ENTRY
        slot, count = tl.load(entry), tl.load(entry + 1)
        order, z_first = tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def gather(z, size, SPLITS: tl.constexpr, NUMBERS: tl.constexpr, EARLY: tl.constexpr):
    """Puts the sum of the splits into the first: `expand` reads z in every tile of outputs."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < size
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.load(z + at, mask=there, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(z + s * size + at, mask=there, other=0.0)
    tl.store(z + at, total, mask=there)


@triton.jit
def _times(z, b, TERMS: tl.constexpr):
    """z bᵀ in float32; z (rows, ranks) float32, b (outputs, ranks) bfloat16."""
    turned = tl.trans(b)
    nothing = tl.zeros((z.shape[0], b.shape[0]), dtype=tl.float32)
    high = z.to(tl.bfloat16)
    total = _product(nothing, high, turned)
    if TERMS > 1:
        rest = z - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        total += _product(nothing, middle, turned)
        if TERMS > 2:
            total += _product(nothing, (rest - middle.to(tl.float32)).to(tl.bfloat16), turned)
    return total


@triton.jit
def _expanded(z, b, TERMS: tl.constexpr):
    """z bᵀ in float32; z (rows, ranks) float32, b (outputs, ranks)."""
    if b.dtype == tl.float32:
        total = _product(tl.zeros((z.shape[0], b.shape[0]), dtype=tl.float32), z, tl.trans(b))
    elif b.dtype == tl.bfloat16:
        total = _times(z, b, TERMS)
    else:  # z may be beyond float16; a float16 number is two bfloat16 numbers, exactly
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
    numbers,  # the memory of `step` as float32: weights
    slots,
    tiles,  # (tiles, TILE) int32
    height,  # rows of B
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    PIECES: tl.constexpr,  # of RANKS; together at least the largest rank
    ONCE: tl.constexpr,  # there is one piece and one plane of tasks: a tile of B stays in registers
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
    slot, count = tl.load(entry), tl.load(entry + 1)
    order, z_first = tl.load(entry + 2), tl.load(entry + 3)
    at_group, groups = tl.load(entry + 4), tl.load(entry + 5)
    at_weight, stride = tl.load(entry + 6), tl.load(entry + 7)
    before = 0
    for _ in range(entries):
        fields = slots + slot * _SLOT
        b = tl.multiple_of(tl.load(fields + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
        owner = tl.multiple_of(tl.load(fields + 2).to(tl.pointer_type(tl.int16)), 16)
        rank = tl.multiple_of(tl.load(fields + 4).to(tl.int32), 16)
        first = (tl.program_id(1) + programs - before % programs) % programs
        if rank > 0:
            if ONCE:
                j = tl.arange(0, RANKS)
                there = valid[:, None] & (j < rank)[None, :]
                place = (b_first + out)[:, None] * rank + j[None, :]
                stored = tl.load(b + place, mask=there, other=0.0)
                owned = tl.load(owner + place, mask=there, other=0)
            for at in range(first * ROWS, count, programs * ROWS):
                i = at + lanes
                inside = i < count
                row = tl.load(step + order + i, mask=inside, other=0).to(tl.int64)
                target = y + row[:, None] * y_stride + (column + out)[None, :]
                changed = inside[:, None] & valid[None, :]
                total = tl.load(target, mask=changed, other=0.0).to(tl.float32)
                plane, bits = tl.load(step + at_group), tl.load(step + at_group + 1)
                weight = tl.load(numbers + at_weight + i * stride, mask=inside, other=0.0)
                for piece in tl.static_range(PIECES):
                    j = piece * RANKS + tl.arange(0, RANKS)
                    there = valid[:, None] & (j < rank)[None, :]
                    place = (b_first + out)[:, None] * rank + j[None, :]
                    if not ONCE:
                        stored = tl.load(b + place, mask=there, other=0.0)
                    if EARLY:
                        tl.extra.cuda.gdc_wait()
                    used = inside[:, None] & (j < rank)[None, :]
                    z_tile = z + (z_first + i)[:, None] * z_stride + (band * rank + j)[None, :]
                    shrunk = tl.load(z_tile, mask=used, other=0.0)
                    for s in tl.static_range(1, SPLITS):
                        shrunk += tl.load(z_tile + s * z_split, mask=used, other=0.0)
                    for g in range(groups):
                        if not ONCE:
                            owned = tl.load(owner + plane.to(tl.int64) * height * rank + place, mask=there, other=0)
                        chosen = (owned & bits.to(tl.int16)) != 0
                        now = weight
                        then = tl.where(g + 1 < groups, g + 1, 0)  # of the next piece, after the last
                        plane, bits = tl.load(step + at_group + 2 * then), tl.load(step + at_group + 2 * then + 1)
                        weight = tl.load(numbers + at_weight + i * stride + then, mask=inside, other=0.0)
                        total += now[:, None] * _expanded(shrunk, tl.where(chosen, stored, 0.0), TERMS)
                tl.store(target, total.to(y.dtype.element_ty), mask=changed)
        before += tl.cdiv(count, ROWS)
        entry += _ENTRY
        slot, count = tl.load(entry), tl.load(entry + 1)
        order, z_first = tl.load(entry + 2), tl.load(entry + 3)
        at_group, groups = tl.load(entry + 4), tl.load(entry + 5)
        at_weight, stride = tl.load(entry + 6), tl.load(entry + 7)
    if EARLY:  # also where there was nothing to do: what comes after this kernel comes after `shrink`
        tl.extra.cuda.gdc_wait()
