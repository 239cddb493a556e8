"""A by its definition, with Python integers and one loop a number: the reference that test vectors come from.

Nothing here is shared with loraf/matrices/projection.py but the table of quantiles, read as raw bytes. It may serve as
the model for an implementation in another language.

    python tests/loraf/vectors/slow_projection.py          writes projection.json beside this file
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parents[2] / "loraf" / "data" / "normal_quantiles.f32"

# Ordinary sizes, odd ones, one number, more than one Philox block a row, seeds of any sign and size, names of any kind.
CASES = [
    {"seed": 0, "module": "model.layers.0.self_attn.q_proj", "rank": 16, "d_in": 128, "std": None},
    {"seed": 0, "module": "model.layers.1.self_attn.q_proj", "rank": 16, "d_in": 128, "std": None},
    {"seed": 1, "module": "model.layers.0.self_attn.q_proj", "rank": 16, "d_in": 128, "std": None},
    {"seed": -1, "module": "model.layers.0.mlp.down_proj", "rank": 8, "d_in": 77, "std": None},
    {"seed": 2**64 + 12345, "module": "model.layers.31.mlp.up_proj", "rank": 4, "d_in": 1000, "std": 0.02},
    {"seed": -(10**40), "module": "lm_head", "rank": 1, "d_in": 1, "std": 1.0},
    {"seed": 42, "module": "Modul.mit.Umlaut.ä", "rank": 3, "d_in": 9, "std": 0.1},
]


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Four 32-bit words from four, ten rounds (Salmon et al. 2011, figure 2 and table 2)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 % 2**32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 % 2**32,
        )
        k0 = (k0 + 0x9E3779B9) % 2**32
        k1 = (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def to_float32(value: float) -> float:
    """The float32 nearest to a double, ties to even."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def table() -> list[float]:
    """The 65,536 quantiles."""
    return list(struct.unpack("<65536f", TABLE.read_bytes()))


def entry(quantiles: list[float], seed: int, module: str, row: int, column: int, std: float) -> float:
    """A[row, column]. `std` is a float32."""
    digest = hashlib.sha256(b"loraf:" + str(seed).encode() + b":" + module.encode()).digest()
    key = (
        sum(digest[i] * 256**i for i in range(4)),
        sum(digest[4 + i] * 256**i for i in range(4)),
    )
    words = philox4x32_10((column // 8, row, 0, 0), key)
    lane = column % 8
    word = words[lane // 2]
    number = word % 65536 if lane % 2 == 0 else word // 65536
    return to_float32(quantiles[number] * std)  # exact in double (24 + 24 bits), so rounded once


def matrix(
    quantiles: list[float], seed: int, module: str, rank: int, d_in: int, std: float | None
) -> list[list[float]]:
    """The whole A, row by row."""
    std = to_float32(1 / math.sqrt(3 * d_in) if std is None else std)
    return [[entry(quantiles, seed, module, row, column, std) for column in range(d_in)] for row in range(rank)]


def vector(quantiles: list[float], case: dict) -> dict:
    """A test vector: the case, the first numbers of its first and last row as hexadecimal floats, and the digest."""
    a = matrix(quantiles, **case)
    data = b"".join(struct.pack("<f", value) for row in a for value in row)
    return case | {
        "first_row": [value.hex() for value in a[0][:8]],
        "last_row": [value.hex() for value in a[-1][:8]],
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def main() -> None:
    quantiles = table()
    content = {
        "generator": "philox4x32-10/normal-65536/1",
        "table_sha256": hashlib.sha256(TABLE.read_bytes()).hexdigest(),
        "made_by": "tests/loraf/vectors/slow_projection.py",
        "vectors": [vector(quantiles, case) for case in CASES],
    }
    (HERE / "projection.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
