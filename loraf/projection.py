"""The frozen projection A, rebuilt from a seed: the same bits on every processor, GPU and library version.

    A[i, j] = table[u16(i, j)] · std          one float32 multiplication, nothing else is floating point

u16(i, j) is lane j mod 8 of Philox-4×32-10 at counter (j div 8, i, 0, 0): the four 32-bit words give eight 16-bit
numbers, the lower half of each word first. The key is the first 8 bytes of SHA-256("loraf:" seed ":" module), as two
little-endian words. The counter is the position, so any slice can be made alone, and row i does not depend on the rank.

The compiled library (loraf.native) makes the same bits; NumPy does where there is none, and is what tests compare with.

Philox: Salmon et al., «Parallel random numbers: as easy as 1, 2, 3», SC 2011.
"""

from __future__ import annotations

import hashlib
import math
import threading
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch

from loraf import native
from loraf.threads import in_threads

GENERATOR = "philox4x32-10/normal-65536/1"
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
LANES = 8  # 16-bit numbers in one Philox block
_BLOCKS_AT_ONCE = 1 << 15  # of one thread in NumPy; 8 scratch bytes a word keep it within the L2 cache
_NUMBERS_AT_ONCE = 1 << 18  # made, then hashed while they are in the cache
_KNOWN_DIGESTS = 1 << 14  # remembered: some 80 models of 200 modules, about 5 MB
_ROUNDED = {torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


@cache
def normal_table() -> np.ndarray:
    """The 65,536 standard normal quantiles, float32, made by tools/make_quantiles.py.

    Raises:
        RuntimeError: the installed file is not the one that this version was released with.
    """
    data = resources.files("loraf").joinpath("data/normal_quantiles.f32").read_bytes()
    if hashlib.sha256(data).hexdigest() != TABLE_SHA256:
        raise RuntimeError("loraf/data/normal_quantiles.f32 has been changed; install loraf again")
    return np.frombuffer(data, dtype="<f4")


def default_std(d_in: int) -> float:
    """1/√(3·d_in): the variance that PEFT's LoRA starts A with (Kaiming uniform with a = √5)."""
    return 1.0 / math.sqrt(3.0 * d_in)


def module_key(seed: int, module: str) -> tuple[int, int]:
    """The two 32-bit words that key Philox for one module."""
    digest = hashlib.sha256(f"loraf:{seed}:{module}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox-4×32-10.

    Args:
        counter: (4, n) unsigned 32-bit words, of any unsigned dtype.
        key: two 32-bit words.

    Returns:
        (4, n) uint32.
    """
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.array(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        # 64-bit products of 32-bit words; the buffers are used again, so that a chunk stays in the cache.
        p0 = c0
        np.multiply(p0, np.uint64(0xD2511F53), out=p0)
        p1 = c2
        np.multiply(p1, np.uint64(0xCD9E8D57), out=p1)
        np.bitwise_xor(c1, np.uint64(k0), out=c1)
        np.bitwise_xor(c1, p1 >> shift, out=c1)
        np.bitwise_xor(c3, np.uint64(k1), out=c3)
        np.bitwise_xor(c3, p0 >> shift, out=c3)
        np.bitwise_and(p0, low, out=p0)
        np.bitwise_and(p1, low, out=p1)
        c0, c1, c2, c3 = c1, p1, c3, p0
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError("slices of A have step 1")
    return start, max(start, stop)


def projection(
    seed: int,
    module: str,
    rank: int,
    d_in: int,
    std: float | None = None,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> np.ndarray:
    """A of one module, or a slice of it.

    Args:
        seed: the checkpoint's seed.
        module: transformers' name of the module, for example `model.layers.0.self_attn.q_proj`.
        rank, d_in: shape of the whole A.
        std: standard deviation; None for `default_std(d_in)`.
        rows, columns: the part wanted (step 1).

    Returns:
        float32, (rows, columns) of the slice; equal to the same slice of the whole.
    """
    matrix = _Matrix.of(seed, module, rank, d_in, std)
    row_bounds, column_bounds = _bounds(rows, rank), _bounds(columns, d_in)
    library = native.library()
    if library is None:
        return _by_numpy(matrix, row_bounds, column_bounds)
    out = np.empty((row_bounds[1] - row_bounds[0], column_bounds[1] - column_bounds[0]), dtype=np.float32)
    key = module_key(seed, module)
    library.projection(normal_table(), matrix.scale, key, row_bounds, column_bounds, out.ctypes.data)
    return out


class _Matrix(NamedTuple):
    """All that one A depends on; `scale` is the standard deviation rounded to float32."""

    generator: str
    seed: int
    module: str
    rank: int
    d_in: int
    scale: np.float32

    @classmethod
    def of(cls, seed: int, module: str, rank: int, d_in: int, std: float | None) -> _Matrix:
        return cls(GENERATOR, seed, module, rank, d_in, np.float32(default_std(d_in) if std is None else std))


def _by_numpy(matrix: _Matrix, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """A part of A, float32, without the compiled library."""
    table = normal_table()
    (r0, r1), (c0, c1) = rows, columns
    first, last = c0 // LANES, -(-c1 // LANES)
    blocks = max(0, last - first)
    out = np.empty((r1 - r0, blocks * LANES), dtype=np.float32)
    key = module_key(matrix.seed, matrix.module)
    rows_at_once = max(1, _BLOCKS_AT_ONCE // max(1, blocks))
    for start in range(r0, r1, rows_at_once):
        stop = min(start + rows_at_once, r1)
        counter = np.zeros((4, (stop - start) * blocks), dtype=np.uint64)
        counter[0] = np.tile(np.arange(first, last, dtype=np.uint64), stop - start)
        counter[1] = np.repeat(np.arange(start, stop, dtype=np.uint64), blocks)
        words = np.ascontiguousarray(philox4x32(counter, key).T, dtype="<u4")
        lanes = words.view("<u2").reshape(stop - start, blocks * LANES)
        np.multiply(table[lanes], matrix.scale, out=out[start - r0 : stop - r0])
    offset = c0 - first * LANES
    return np.ascontiguousarray(out[:, offset : offset + (c1 - c0)])


def _fill(matrix: _Matrix, out: torch.Tensor | None, sha: hashlib._Hash | None) -> None:
    """Makes A some rows at a time: rounded into `out`, as float32 into `sha`, each unless it is None."""
    library = native.library()
    key = module_key(matrix.seed, matrix.module)
    table, columns = normal_table(), (0, matrix.d_in)
    kind = 0 if out is None else _ROUNDED.get(out.dtype, 0)
    in_place = out is not None and out.dtype == torch.float32
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, matrix.d_in))
    scratch = None if in_place else np.empty((min(at_once, matrix.rank), matrix.d_in), dtype=np.float32)
    for first in range(0, matrix.rank, at_once):
        rows = (first, min(first + at_once, matrix.rank))
        part = None if out is None else out[slice(*rows)]
        made = part.numpy() if in_place else scratch[: rows[1] - first]
        if library is None:
            made[:] = _by_numpy(matrix, rows, columns)
        else:
            out32 = made.ctypes.data if sha or not kind else None
            library.projection(table, matrix.scale, key, rows, columns, out32, part.data_ptr() if kind else None, kind)
        if part is not None and not in_place and not (library and kind):
            part.copy_(torch.from_numpy(made))
        if sha:
            sha.update(made.astype("<f4", copy=False).data)


_known: dict[_Matrix, str] = {}  # digests found in this process, the oldest first
_knowing = threading.Lock()


def _remember(matrix: _Matrix, found: str) -> str:
    with _knowing:
        _known[matrix] = found
        while len(_known) > _KNOWN_DIGESTS:
            del _known[next(iter(_known))]
    return found


def forget_digests() -> None:
    """Makes the next `digest_of` and `made` compute what they would have remembered."""
    with _knowing:
        _known.clear()


def digest_of(seed: int, module: str, rank: int, d_in: int, std: float | None = None) -> str:
    """`digest(projection(…))`, computed once in a process, without holding all of A."""
    matrix = _Matrix.of(seed, module, rank, d_in, std)
    found = _known.get(matrix)
    if found is None:
        sha = hashlib.sha256()
        _fill(matrix, None, sha)
        found = _remember(matrix, sha.hexdigest())
    return found


def made(
    seed: int, module: str, rank: int, d_in: int, std: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, str]:
    """A of one module rounded to `dtype`, and the digest of A in float32, in one pass.

    A digest that this process has computed before is taken from there: A depends on nothing but the arguments.

    Returns:
        (rank, d_in) of `dtype`, equal to `torch.from_numpy(projection(…)).to(dtype)`; `digest_of(…)`.
    """
    matrix = _Matrix.of(seed, module, rank, d_in, std)
    out = torch.empty((rank, d_in), dtype=dtype)
    found = _known.get(matrix)
    sha = None if found else hashlib.sha256()
    _fill(matrix, out, sha)
    return out, found or _remember(matrix, sha.hexdigest())


def digest(a: np.ndarray) -> str:
    """SHA-256 of A as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(a, dtype="<f4").data).hexdigest()


def digests(seed: int, rank: int, modules: dict[str, tuple[int, int]], std: float | None = None) -> dict[str, str]:
    """`digest_of` every module's A, several modules at a time.

    Args:
        modules: name → (d_out, d_in).
    """
    found = in_threads(lambda name: digest_of(seed, name, rank, modules[name][1], std), modules)
    return dict(zip(modules, found, strict=True))


def combined_digest(module_digests: dict[str, str]) -> str:
    """One digest for all modules' A: SHA-256 over `name digest` lines sorted by name."""
    lines = "".join(f"{name} {module_digests[name]}\n" for name in sorted(module_digests))
    return hashlib.sha256(lines.encode()).hexdigest()
