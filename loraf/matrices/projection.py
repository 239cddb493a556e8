"""The frozen projection A, generated from a seed: the same bits on every processor, GPU and library version.

    A[i, j] = table[u16(i, j)] · std          one float32 multiplication; everything else is integer arithmetic

u16(i, j) is lane j mod 8 of Philox-4×32-10 at counter (j div 8, i, 0, 0): the four 32-bit words give eight 16-bit
numbers, the lower half of each word first. The key is the first 8 bytes of SHA-256("loraf:" seed ":" module), as two
little-endian words. The counter is the position, so any slice can be computed alone, and no row depends on the rank.

The compiled library (loraf.matrices.native) computes the same bits. NumPy is the fallback, and the reference in tests.

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

from loraf.matrices import native
from loraf.system import in_threads

GENERATOR = "philox4x32-10/normal-65536/1"
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
LANES = 8  # 16-bit numbers in one Philox block
_BLOCKS_AT_ONCE = 1 << 15  # per thread in NumPy; with 8 scratch bytes per word they fit the L2 cache
_NUMBERS_AT_ONCE = 1 << 18  # generated, then hashed while they are in the cache
_KNOWN_DIGESTS = 1 << 14  # cached: about 80 models of 200 modules, 5 MB
_ROUNDED = {torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


@cache
def normal_table() -> np.ndarray:
    """Returns the 65,536 standard normal quantiles, float32, that tools/make_quantiles.py computed.

    Raises:
        RuntimeError: the installed file is not the one of this release.
    """
    data = resources.files("loraf").joinpath("data/normal_quantiles.f32").read_bytes()
    if hashlib.sha256(data).hexdigest() != TABLE_SHA256:
        raise RuntimeError("loraf/data/normal_quantiles.f32 has been changed; install loraf again")
    return np.frombuffer(data, dtype="<f4")


def default_std(d_in: int) -> float:
    """Returns 1/√(3·d_in), which gives the variance of A in PEFT's LoRA (Kaiming uniform with a = √5)."""
    return 1.0 / math.sqrt(3.0 * d_in)


def module_key(seed: int, module: str) -> tuple[int, int]:
    """Returns Philox's key for one module, two 32-bit words."""
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
        # 64-bit products of 32-bit words. Buffers are reused, so that a chunk stays in the cache.
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
    """Computes A of one module, or a slice of it.

    Args:
        seed: the checkpoint's seed.
        module: transformers' name of the module, such as `model.layers.0.self_attn.q_proj`.
        rank, d_in: shape of the whole A.
        std: standard deviation; None: `default_std(d_in)`.
        rows, columns: the slice, with step 1.

    Returns:
        (rows, columns) float32, equal to the same slice of the whole A.
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
    """Everything that one A depends on. `scale` is the standard deviation, rounded to float32."""

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
    """Computes a part of A, float32, without the compiled library."""
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
    """Computes A in blocks of rows. Writes it to `out`, rounded to its dtype, and adds the float32 bytes to `sha`."""
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
        if scratch is not None:
            block = scratch[: rows[1] - first]
        else:
            assert part is not None  # float32: computed in place
            block = part.numpy()
        if library is None:
            block[:] = _by_numpy(matrix, rows, columns)
        else:
            out32 = block.ctypes.data if sha or not kind else None
            out16 = part.data_ptr() if part is not None and kind else None
            library.projection(table, matrix.scale, key, rows, columns, out32, out16, kind)
        if part is not None and not in_place and not (library and kind):
            part.copy_(torch.from_numpy(block))
        if sha:
            sha.update(block.astype("<f4", copy=False).data)


_digests: dict[_Matrix, str] = {}  # computed in this process, the oldest first
_digests_lock = threading.Lock()


def _remember(matrix: _Matrix, sha256: str) -> str:
    with _digests_lock:
        _digests[matrix] = sha256
        while len(_digests) > _KNOWN_DIGESTS:
            del _digests[next(iter(_digests))]
    return sha256


def forget_digests() -> None:
    """Clears the cache of `digest_of` and `projection_and_digest`."""
    with _digests_lock:
        _digests.clear()


def digest_of(seed: int, module: str, rank: int, d_in: int, std: float | None = None) -> str:
    """Returns `digest(projection(…))`, computed once in a process, without holding all of A."""
    matrix = _Matrix.of(seed, module, rank, d_in, std)
    known = _digests.get(matrix)
    if known is not None:
        return known
    sha = hashlib.sha256()
    _fill(matrix, None, sha)
    return _remember(matrix, sha.hexdigest())


def projection_and_digest(
    seed: int, module: str, rank: int, d_in: int, std: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, str]:
    """Computes A of one module rounded to `dtype`, and the digest of A in float32, in one pass.

    A digest that this process has computed before is not computed again: A depends only on the arguments.

    Returns:
        (rank, d_in) of `dtype`, equal to `torch.from_numpy(projection(…)).to(dtype)`; and `digest_of(…)`.
    """
    matrix = _Matrix.of(seed, module, rank, d_in, std)
    out = torch.empty((rank, d_in), dtype=dtype)
    known = _digests.get(matrix)
    if known is not None:
        _fill(matrix, out, None)
        return out, known
    sha = hashlib.sha256()
    _fill(matrix, out, sha)
    return out, _remember(matrix, sha.hexdigest())


def digest(a: np.ndarray) -> str:
    """Returns the SHA-256 of A as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(a, dtype="<f4").data).hexdigest()


def digests(seed: int, rank: int, modules: dict[str, tuple[int, int]], std: float | None = None) -> dict[str, str]:
    """Returns `digest_of` every module's A, computed several modules at a time.

    Args:
        modules: name → (d_out, d_in).
    """
    values = in_threads(lambda name: digest_of(seed, name, rank, modules[name][1], std), modules)
    return dict(zip(modules, values, strict=True))


def combined_digest(module_digests: dict[str, str]) -> str:
    """Returns one digest for all modules' A: the SHA-256 of `name digest` lines, sorted by name."""
    lines = "".join(f"{name} {module_digests[name]}\n" for name in sorted(module_digests))
    return hashlib.sha256(lines.encode()).hexdigest()
