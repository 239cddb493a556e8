"""Makes loraf/data/normal_quantiles.f32: 65,536 quantiles of the standard normal distribution.

Entry k is Φ⁻¹((k + ½) / 65536), computed with 50 decimal digits and rounded once to float32 (little-endian), so that
no maths library takes part in rebuilding A. `loraf/matrices/projection.py` holds the digest that this prints.

    python tools/make_quantiles.py loraf/data/normal_quantiles.f32
"""

import hashlib
import sys
from pathlib import Path

import mpmath
import numpy as np

ENTRIES = 1 << 16


def upper_half() -> list[float]:
    """Φ⁻¹ at (k + ½)/65536 for k = 32768 … 65535, each found by Newton's method from its predecessor."""
    mpmath.mp.dps = 50
    values: list[float] = []
    x = mpmath.mpf(0)
    for k in range(ENTRIES // 2, ENTRIES):
        p = (mpmath.mpf(k) + mpmath.mpf(1) / 2) / ENTRIES
        while True:
            # The derivative of Φ is the density; ncdf is mpmath's Φ.
            step = (mpmath.ncdf(x) - p) / mpmath.npdf(x)
            x -= step
            if abs(step) < mpmath.mpf(10) ** -40:
                break
        values.append(float(np.float32(mpmath.nstr(x, 30))))
    return values


def main() -> None:
    half = np.array(upper_half(), dtype="<f4")
    table = np.concatenate([-half[::-1], half])
    Path(sys.argv[1]).write_bytes(table.tobytes())
    print(hashlib.sha256(table.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
