"""The GPU kernel against the formula. Without a GPU it runs in Triton's interpreter, which rounds bfloat16 differently
from a GPU, so bfloat16 is tested on GPUs only."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraf_serve.kernels import BatchWeights
from tests.loraf_serve.kernel_cases import Case, assert_rest_untouched, cases, disjoint_bs, make_case
from tests.loraf_serve.kernel_cases import assert_right as assert_within
from tests.tools import needs

triton_kernel = pytest.importorskip("loraf_serve.kernels.triton_kernel", reason=needs("Triton"))
device_weights = pytest.importorskip("loraf_serve.kernels.device_weights", reason=needs("Triton"))

GPU = torch.cuda.is_available()
DEVICE = triton_kernel.default_device()
DTYPES = (torch.float16, torch.float32, *([torch.bfloat16] if GPU else []))
needs_gpu = pytest.mark.skipif(not GPU, reason=needs("GPU"))
few = settings(
    max_examples=200 if GPU else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Triton reads the variable again when an interpreted kernel is first called; see tests/conftest.py."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def disjoint(seed: int, **more) -> Case:
    dtype = more.pop("dtype", torch.float32)
    return make_case(seed, dtype=dtype, value_dtype=dtype, disjoint=True, **more)


def assert_right(case: Case, y: torch.Tensor, n: int | None = None) -> None:
    """Compares within the precision of A x in a step of n rows (by default, the case's)."""
    n = len(case.x) if n is None else n
    terms = 3 if n <= 16 or case.x.dtype == torch.float32 else 2 if n <= 64 or case.x.dtype == torch.float16 else 1
    assert_within(case, y, 0.0 if terms == 3 else 2.0 ** (-8 * terms - 1))


def placed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x on the device, and a fresh y there with the same strides and surrounding memory."""
    whole = case.whole_y.to(DEVICE, copy=True)
    return case.x.to(DEVICE), whole.as_strided(case.y.shape, case.y.stride(), case.y.storage_offset())


def back(case: Case, y: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(0, dtype=y.dtype, device=y.device).set_(y.untyped_storage()).cpu()
    return whole.as_strided(y.shape, case.y.stride(), case.y.storage_offset())


def result(case: Case) -> torch.Tensor:
    x, y = placed(case)
    triton_kernel.TritonOperand(case.parts).add_delta(y, x, case.batch)
    return back(case, y)


@few
@given(case=cases(dtypes=DTYPES, disjoint=True))
def test_equals_the_formula(case):
    y = result(case)
    assert_right(case, y)
    assert_rest_untouched(case, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("sets", [None, 1])
def test_every_size_of_batch(dtype, n, sets):
    case = disjoint(n, dtype=dtype, shapes=((64, 300), (64, 40)), n=n, margins=(3, 7), sets=sets)
    assert_right(case, result(case))


def test_a_prefill_of_several_requests():
    """Some sets have many rows, which form one entry each, others have few."""
    case = disjoint(1, n=400, acting=390, d_in=64, shapes=((16, 70),), tasks=3)
    weights = case.batch.weights[:9][torch.tensor([*([0] * 150), *([1] * 130), *range(2, 7), *([8] * 65), *([7] * 40)])]
    case.batch = BatchWeights(case.batch.indices, weights.contiguous())
    y = result(case)
    assert_right(case, y)
    assert_rest_untouched(case, y)


def test_tasks_of_equal_weight_share_a_product_even_if_the_weight_is_not_one():
    case = disjoint(2, tasks=6, n=20, sets=1)
    weights = torch.tensor([0.5, 0.0, 0.5, -2.0, 0.5, 0.0]).repeat(20, 1)
    case.batch = BatchWeights(case.batch.indices, weights)
    assert_right(case, result(case))


def test_an_intermediate_sum_beyond_float16():
    case = disjoint(3, dtype=torch.float16, n=4, d_in=64, shapes=((16, 20),), idle=0.0)
    case.x.mul_(3000)
    case.parts[0].a.mul_(100)
    for b in case.parts[0].tasks:
        b.values.mul_(1e-4)
    y = result(case)
    assert (case.x.float() @ case.parts[0].a.float().T).abs().max() > 65504
    assert y.isfinite().all()
    assert_right(case, y)


def test_a_nan_row_does_not_affect_other_rows():
    case = disjoint(5, n=20, idle=0.0)
    clean = result(case)
    case.x[3] = torch.nan
    y = result(case)
    assert y[3].isnan().any()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize(("tasks", "bytes_per_position"), [(16, 4), (17, 6)])
def test_nbytes_of_16_bit_numbers(tasks, bytes_per_position):
    parts = disjoint(0, dtype=torch.float16, shapes=((64, 640),), d_in=128, tasks=tasks).parts
    assert triton_kernel.TritonOperand(parts).nbytes == 2 * 64 * 128 + bytes_per_position * 64 * 640


@pytest.mark.parametrize("tasks", [15, 16, 17, 33])
@pytest.mark.parametrize("sets", [None, 1])
def test_many_tasks(tasks, sets):
    case = disjoint(tasks, tasks=tasks, n=20, shapes=((16, 70), (8, 40)), sets=sets, idle=0.2)
    if sets:  # equal weights: one product per plane
        case.batch = BatchWeights(case.batch.indices, (case.batch.weights != 0).float())
    assert_right(case, result(case))


def test_parts_that_do_not_fit_the_layer_are_refused():
    parts = make_case(0).parts  # random positions overlap
    with pytest.raises(ValueError, match="task 1 has positions that an earlier task owns"):
        triton_kernel.TritonOperand(parts)
    good = disjoint(0, shapes=((64, 300),)).parts
    with pytest.raises(ValueError, match="columns 0 to 300 are not one of the layer's bands"):
        triton_kernel.TritonOperand(good, triton_kernel.Layer([(0, 200), (200, 100)], 64, 4, DEVICE))
    with pytest.raises(ValueError, match="rank: 64 is above the layer's limit of 32"):
        triton_kernel.TritonOperand(good, triton_kernel.Layer([(0, 300)], 17, 4, DEVICE))


class Stand:
    """A layer and several adapters in one step."""

    def __init__(self, adapters: int, n: int, columns: int, d_in: int, dtype: torch.dtype = torch.float32):
        g = torch.Generator().manual_seed(adapters + n)
        self.y = torch.randn(n, columns, generator=g).to(dtype)
        self.x = torch.randn(n, d_in, generator=g).to(dtype)
        self.table = triton_kernel.AdapterTable(["other", "layer"], 3, DEVICE)
        self.step = device_weights.DeviceWeights(DEVICE, rows=n, tasks=4, width=3 * 128, adapters=3)
        self.bands = [(0, 70), (70, columns - 80), (columns - 10, 10)]
        self.layer = triton_kernel.Layer(self.bands, 128, 4, DEVICE)
        # (band, rank) of each part of each adapter.
        self.adapter_parts = [((0, 16), (1, 16)), ((1, 33),), ((0, 120), (2, 48))]
        self.dtype, self.d_in, self.generator = dtype, d_in, g

    def adapter(self, number: int, tasks: int) -> Case:
        shapes = tuple((rank, self.bands[band][1]) for band, rank in self.adapter_parts[number])
        case = disjoint(number, dtype=self.dtype, shapes=shapes, d_in=self.d_in, tasks=tasks, n=1)
        offsets = [self.bands[band][0] for band, _ in self.adapter_parts[number]]
        case.parts = [dataclasses.replace(part, offset=at) for part, at in zip(case.parts, offsets, strict=True)]
        case.x, case.y = self.x, self.y
        return case

    def batch(self, indices: list[int], tasks: int) -> BatchWeights:
        return BatchWeights(
            torch.tensor(indices, dtype=torch.int32), torch.randn(len(indices), tasks, generator=self.generator)
        )

    def launch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        triton_kernel.add_deltas(y, x, self.step, self.table.of("layer"), self.layer)

    def check(self, y: torch.Tensor, cases: list[Case]) -> None:
        """Each row belongs to at most one adapter, so each case must be right in its own rows."""
        idle = torch.ones(len(y), dtype=torch.bool)
        for case in cases:
            rows = case.batch.indices.long()
            idle[rows] = False
            own = dataclasses.replace(
                case,
                x=self.x[rows],
                y=self.y[rows],
                batch=BatchWeights(torch.arange(len(rows), dtype=torch.int32), case.batch.weights),
            )
            assert_right(own, y[rows], len(y))
        assert torch.equal(y[idle], self.y[idle])


@few
@given(n=st.integers(3, 150), data=st.data())
def test_several_adapters_in_one_step(n, data):
    stand = Stand(3, n, 200, 50)
    owner = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    cases_ = []
    for number, tasks in enumerate((2, 4, 1)):
        case = stand.adapter(number, tasks)
        case.batch = stand.batch([i for i, o in enumerate(owner) if o == number], tasks)
        stand.table.put(str(number), {"layer": triton_kernel.TritonOperand(case.parts, stand.layer)})
        cases_.append(case)
    stand.step.set([(stand.table.index(str(i)), case.batch) for i, case in enumerate(cases_) if case.batch.count])
    x, y = stand.x.to(DEVICE), stand.y.to(DEVICE, copy=True)
    stand.launch(x, y)
    stand.check(y.cpu(), cases_)


def test_an_adapter_without_parts_in_a_layer_or_removed_adds_nothing():
    stand = Stand(1, 8, 200, 50)
    case = stand.adapter(0, 2)
    case.batch = stand.batch([1, 2, 5], 2)
    operand = triton_kernel.TritonOperand(case.parts, stand.layer)
    stand.table.put("elsewhere", {"other": operand})
    stand.step.set([(stand.table.index("elsewhere"), case.batch)])
    x, y = stand.x.to(DEVICE), stand.y.to(DEVICE, copy=True)
    stand.launch(x, y)
    assert torch.equal(y.cpu(), stand.y)
    stand.table.put("here", {"layer": operand})
    stand.step.set([(stand.table.index("here"), case.batch)])
    stand.launch(x, y)
    stand.check(y.cpu(), [case])
    changed = y.clone()
    stand.table.remove("here")
    stand.launch(x, y)
    assert torch.equal(y, changed)
    assert stand.table.free() == 2


def test_more_adapters_or_rows_than_fit_are_refused():
    stand = Stand(1, 8, 200, 50)
    for name in "abc":
        stand.table.put(name, {})
    with pytest.raises(ValueError, match="adapter table is full with 3 adapters"):
        stand.table.put("d", {})
    stand.table.remove("b")
    stand.table.put("d", {})
    assert [stand.table.index(name) for name in "adc"] == [0, 1, 2]
    with pytest.raises(ValueError, match="more than 8 rows"):
        stand.step.set([(0, stand.batch(list(range(9)), 2))])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_serves_rows_and_adapters_added_later(dtype):
    stand = Stand(2, 40, 200, 64, dtype)
    x, y = stand.x.to(DEVICE), stand.y.to(DEVICE, copy=True)
    stand.step.set([])
    stand.launch(x, y)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stand.launch(x, y)
    for turn in range(6):
        cases_ = []
        for number in range(1 + turn % 2):
            case = stand.adapter(number, 3)
            case.batch = stand.batch(list(range(number * 20 + turn, number * 20 + 20)), 3)
            if turn < 2:
                stand.table.put(f"{turn}{number}", {"layer": triton_kernel.TritonOperand(case.parts, stand.layer)})
            cases_.append(case)
        first = "0" if turn % 2 == 0 else "1"
        stand.step.set([(stand.table.index(f"{first}{i}"), case.batch) for i, case in enumerate(cases_)])
        y.copy_(stand.y)
        graph.replay()
        stand.check(y.cpu(), cases_)


@needs_gpu
def test_the_same_step_gives_the_same_bits():
    case = disjoint(9, dtype=torch.bfloat16, n=50, d_in=4096, shapes=((64, 1024), (64, 256)))
    assert all(torch.equal(result(case), result(case)) for _ in range(20))


def test_positions_of_disjoint_cases_do_not_overlap():
    b_of_tasks = disjoint_bs(torch.Generator().manual_seed(0), 4, 30, 8, 0.25, torch.float32)
    positions = torch.cat([b.positions for b in b_of_tasks])
    assert len(positions.unique()) == len(positions) == 240
