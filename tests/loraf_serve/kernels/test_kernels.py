"""Every kernel against the formula in NumPy's float64, and the guarantees of the interface."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from loraf_serve import kernels
from loraf_serve.kernels import KERNELS, BatchWeights, Part, prepare
from loraf_serve.kernels.cpu_library import why_not_native
from tests.loraf_serve.kernel_cases import (
    DTYPES,
    Case,
    assert_rest_untouched,
    assert_right,
    cases,
    make_case,
    needs_native,
)

each_kernel = pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=needs_native if name == "native" else ()) for name in KERNELS]
)


def result(case: Case, kernel: str) -> torch.Tensor:
    y = case.fresh_y()
    prepare(case.parts, kernel).add_delta(y, case.x, case.batch)
    return y


@each_kernel
@settings(max_examples=60, deadline=None)
@given(case=cases())
@pytest.mark.slow
def test_equals_the_formula(kernel, case):
    y = result(case, kernel)
    assert_right(case, y)
    assert_rest_untouched(case, y)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 33, 64, 65])
def test_every_size_of_batch(kernel, dtype, n):
    case = make_case(n, dtype=dtype, shapes=((64, 300), (64, 40)), n=n, margins=(3, 7))
    assert_right(case, result(case, kernel))


@pytest.mark.parametrize("kernel", ["torch", pytest.param("native", marks=needs_native)])
def test_a_prefill_of_more_rows_than_one_block(kernel):
    case = make_case(1, n=1200, acting=1150, d_in=64, shapes=((16, 70),), tasks=3)
    y = result(case, kernel)
    assert_right(case, y)
    assert_rest_untouched(case, y)


@each_kernel
def test_a_sum_is_rounded_once(kernel):
    """Two tasks each add less than half a unit of y, together more: rounding after each task would lose both."""
    case = make_case(0, shapes=((1, 1),), d_in=1, tasks=2, density=1.0, n=1, idle=0.0)
    for b in case.parts[0].tasks:
        b.values.fill_(1.0)
    case.parts[0].a.fill_(1.0)
    case.x.fill_(1.0)
    y = torch.ones_like(case.y)  # its unit in the last place is 2^-7
    batch = BatchWeights(case.batch.indices, torch.full((1, 2), 2.0**-8 * 0.75))
    prepare(case.parts, kernel).add_delta(y, case.x, batch)
    assert y.item() == 1 + 2.0**-7


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_go_to_even_and_large_sums_to_infinity(kernel, dtype):
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    case = make_case(0, dtype=dtype, value_dtype=torch.float32, shapes=((1, 4),), d_in=1, tasks=1, density=1.0, n=1)
    largest = torch.finfo(dtype).max
    case.parts[0].tasks[0].values.copy_(torch.tensor([unit / 2, unit / 2, -unit / 4, largest]))
    case.parts[0].a.fill_(1.0)
    case.x.fill_(1.0)
    y = torch.tensor([[1.0, 1.0 + unit, 1.0, largest]]).to(dtype)
    expected = torch.tensor([[1.0, 1.0 + 2 * unit, 1.0 - unit / 4, torch.inf]])
    prepare(case.parts, kernel).add_delta(y, case.x, BatchWeights(case.batch.indices, torch.ones(1, 1)))
    assert torch.equal(y, expected.to(dtype))  # (1 - unit/4 is a tie too: half a unit below one)


@each_kernel
def test_a_nan_row_does_not_affect_other_rows(kernel):
    case = make_case(5, n=20, idle=0.0)
    clean = result(case, kernel)
    case.x[3] = torch.nan
    y = result(case, kernel)
    assert y[3].isnan().any()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(y[others], clean[others])


@each_kernel
def test_parts_are_copied(kernel):
    case = make_case(2)
    operand = prepare(case.parts, kernel)
    for part in case.parts:
        part.a.fill_(torch.nan)
        for b in part.tasks:
            b.values.fill_(torch.nan)
            b.cols.fill_(0)
    y = case.fresh_y()
    operand.add_delta(y, case.x, case.batch)
    assert torch.isfinite(y).all()


MEASURE_MEMORY = """
import sys
import psutil
import torch
from loraf_serve.kernels import prepare
from tests.loraf_serve.kernel_cases import make_case

def resident():
    return psutil.Process().memory_info().rss

case = make_case(0, shapes=((64, 20_000), (64, 20_000)), d_in=20_000, tasks=8, n=1)
prepare(make_case(0).parts, sys.argv[1])  # allocations of a first call
before = resident()
operand = prepare(case.parts, sys.argv[1])
print(resident() - before, operand.nbytes)
"""


@pytest.mark.parametrize("kernel", ["torch", pytest.param("native", marks=needs_native)])
def test_nbytes_equals_the_growth_of_the_process(kernel):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, kernel], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    grown, nbytes = map(int, run.stdout.split())
    assert nbytes > 10e6  # large compared with other allocations
    assert abs(grown - nbytes) < 0.03 * nbytes + 2**20


def test_auto_is_the_fastest():
    operand = prepare(make_case(0).parts)
    assert type(operand) is KERNELS[kernels.fastest()]
    assert kernels.fastest() == ("torch" if why_not_native() else "native")


# --- refused calls --------------------------------------------------------------------------------------------


def changed(part: Part, **fields) -> Part:
    return Part(**({name: getattr(part, name) for name in Part.__dataclass_fields__} | fields))


@each_kernel
def test_every_mismatch_of_the_parts_is_named(kernel):
    first, second = make_case(0, shapes=((8, 20), (8, 20))).parts
    with pytest.raises(ValueError, match="no parts"):
        prepare([], kernel)
    with pytest.raises(ValueError, match="part 1: A must be a contiguous matrix"):
        prepare([first, changed(second, a=second.a.double())], kernel)
    with pytest.raises(ValueError, match="part 1: A differs.*part 1: 3 tasks, but the first part has 4"):
        prepare([first, changed(second, a=second.a.float(), tasks=second.tasks[:3])], kernel)
    with pytest.raises(ValueError, match="two parts add to the same columns"):
        prepare([first, changed(second, offset=19)], kernel)
    with pytest.raises(ValueError, match="B of task 0 has shape.*21 rows are needed"):
        prepare([changed(first, stop_row=21)], kernel)
    with pytest.raises(ValueError, match="no tasks"):
        prepare([changed(first, tasks=[])], kernel)


@each_kernel
def test_tensors_that_do_not_fit_are_refused(kernel):
    case = make_case(0, n=6)
    operand = prepare(case.parts, kernel)
    y = case.fresh_y()
    for bad_y, bad_x, batch in (
        (y.float(), case.x, case.batch),
        (y, case.x.float(), case.batch),
        (y[:, :-1], case.x, case.batch),
        (y, case.x[:, :-1], case.batch),
        (y[:5], case.x[:5], case.batch),  # the batch includes row 5
        (y[:5], case.x, case.batch),
        (y.t().contiguous().t(), case.x, case.batch),
        (y, case.x, BatchWeights(case.batch.indices, case.batch.weights[:, :3].contiguous())),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            operand.add_delta(bad_y, bad_x, batch)


def test_invalid_batch_weights_are_refused():
    weights = torch.ones(2, 3)
    for indices, bad_weights in (
        (torch.tensor([0, 1]), weights),
        (torch.tensor([0, 1], dtype=torch.int32), weights.double()),
        (torch.tensor([0, 1], dtype=torch.int32), weights[:1]),
        (torch.tensor([0, 1], dtype=torch.int32), torch.ones(3, 2).t()),
        (torch.tensor([1, 0], dtype=torch.int32), weights),
        (torch.tensor([1, 1], dtype=torch.int32), weights),
        (torch.tensor([-1, 1], dtype=torch.int32), weights),
    ):
        with pytest.raises(ValueError):
            BatchWeights(indices, bad_weights)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="choose from: auto, reference, torch, native"):
        prepare(make_case(0).parts, "fast")
