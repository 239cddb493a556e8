"""The frozen projection A, rebuilt from a seed: the same bits on every processor, GPU and library version.

    A[i, j] = table[u16(i, j)] · std          one float32 multiplication, nothing else is floating point

u16(i, j) is lane j mod 8 of Philox-4×32-10 at counter (j div 8, i, 0, 0): the four 32-bit words give eight 16-bit
numbers, the lower half of each word first. The key is the first 8 bytes of SHA-256("loraf:" seed ":" module), as two
little-endian words. The counter is the position, so any slice can be made alone, and row i does not depend on the rank.

Philox: Salmon et al., «Parallel random numbers: as easy as 1, 2, 3», SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources

import numpy as np

GENERATOR = "philox4x32-10/normal-65536/1"
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
LANES = 8  # 16-bit numbers in one Philox block
_BLOCKS_AT_ONCE = 1 << 15  # of one thread; 8 scratch bytes a word keep it within the L2 cache


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
    table = normal_table()
    scale = np.float32(default_std(d_in) if std is None else std)
    r0, r1 = _bounds(rows, rank)
    c0, c1 = _bounds(columns, d_in)
    first, last = c0 // LANES, -(-c1 // LANES)
    blocks = max(0, last - first)
    out = np.empty((r1 - r0, blocks * LANES), dtype=np.float32)
    key = module_key(seed, module)
    rows_at_once = max(1, _BLOCKS_AT_ONCE // max(1, blocks))
    for start in range(r0, r1, rows_at_once):
        stop = min(start + rows_at_once, r1)
        counter = np.zeros((4, (stop - start) * blocks), dtype=np.uint64)
        counter[0] = np.tile(np.arange(first, last, dtype=np.uint64), stop - start)
        counter[1] = np.repeat(np.arange(start, stop, dtype=np.uint64), blocks)
        words = np.ascontiguousarray(philox4x32(counter, key).T, dtype="<u4")
        lanes = words.view("<u2").reshape(stop - start, blocks * LANES)
        np.multiply(table[lanes], scale, out=out[start - r0 : stop - r0])
    offset = c0 - first * LANES
    return np.ascontiguousarray(out[:, offset : offset + (c1 - c0)])


def digest(a: np.ndarray) -> str:
    """SHA-256 of A as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(a, dtype="<f4").data).hexdigest()


def digests(seed: int, rank: int, modules: dict[str, tuple[int, int]], std: float | None = None) -> dict[str, str]:
    """The digest of every module's A, several modules at a time.

    Args:
        modules: name → (d_out, d_in).
    """
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: digest(projection(seed, name, rank, modules[name][1], std)), modules)
        return dict(zip(modules, made, strict=True))


def combined_digest(module_digests: dict[str, str]) -> str:
    """One digest for all modules' A: SHA-256 over `name digest` lines sorted by name."""
    lines = "".join(f"{name} {module_digests[name]}\n" for name in sorted(module_digests))
    return hashlib.sha256(lines.encode()).hexdigest()
