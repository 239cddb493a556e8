"""The native kernel: every instruction set, threads, and bit-identical results."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.matrices.sparse import SparseB
from loraf_serve.kernels import BatchWeights, Part, cpu_library, prepare
from loraf_serve.kernels.cpu_kernel import NativeOperand
from tests.loraf_serve.kernel_cases import (
    COMPILER,
    DTYPES,
    Case,
    assert_rest_untouched,
    assert_right,
    bits,
    cases,
    make_case,
    needs_compiler,
    needs_native,
    random_b,
)
from tests.tools import needs

SOURCES = Path(cpu_library.__file__).parent / "csrc"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
VARIANTS = ("plain", "avx2", "avx512", "avx512bf16")
EMULATED = "avx512bf16, emulated"


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> cpu_library.CpuLibrary:
    """The library with the AVX-512-BF16 variant, but VDPBF16PS emulated, so that any AVX-512 processor runs it."""
    if COMPILER is None:
        pytest.skip(needs("C++ compiler"))
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    units = {
        "delta.cpp": [["-DLORAF_VARIANT=plain"], ["-DLORAF_VARIANT=avx512bf16", "-DLORAF_EMULATE_BF16", *AVX512]],
        "library.cpp": [["-DLORAF_WITH_avx512bf16"]],
        "pack.cpp": [[]],
    }
    assert set(units) == {file.name for file in SOURCES.glob("*.cpp")}
    objects = []
    for file, variants in units.items():
        for variant_flags in variants:
            objects.append(folder / f"{len(objects)}.o")
            command = [COMPILER, *flags, *variant_flags, "-c", SOURCES / file, "-o", objects[-1]]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stderr
    target = folder / "_emulated.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", target], check=True, timeout=60)
    return cpu_library.load(target)


@pytest.fixture(scope="session", params=[*VARIANTS, EMULATED])
def built_variant(request) -> tuple[cpu_library.CpuLibrary, str]:
    """A library and one of its variants that this processor runs."""
    if request.param == EMULATED:
        built, variant = request.getfixturevalue("emulated"), "avx512bf16"
    else:
        if COMPILER is None and cpu_library.why_not_native():
            pytest.skip(needs("C++ compiler"))
        built, variant = cpu_library.load(), request.param
    if variant in built.variants:
        return built, variant
    pytest.skip(f"this processor lacks {variant}" if variant in built.lacking else f"not compiled for {variant}")


def result(case: Case, built_variant: tuple[cpu_library.CpuLibrary, str]) -> torch.Tensor:
    y = case.fresh_y()
    NativeOperand(case.parts, *built_variant).add_delta(y, case.x, case.batch)
    return y


@needs_compiler
def test_with_a_compiler_the_native_kernel_is_available():
    assert cpu_library.why_not_native() is None


@needs_native
def test_the_best_variant_is_the_default():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    present = [
        name
        for name, flag in zip(VARIANTS, ("", "avx2", "avx512bw", "avx512_bf16"), strict=True)
        if flag in [*flags, ""]
    ]
    assert [*cpu_library.load().variants] == present
    assert prepare(make_case(0).parts).variant == present[-1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_equals_the_formula(built_variant, data):
    case = data.draw(cases())
    y = result(case, built_variant)
    assert_right(case, y)
    assert_rest_untouched(case, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_in", [1, 2, 511, 512, 513, 1025])
def test_depths_around_the_tile(built_variant, dtype, d_in):
    case = make_case(d_in, dtype=dtype, d_in=d_in, shapes=((33, 257), (129, 15)), n=11, acting=9, margins=(3, 2))
    assert_right(case, result(case, built_variant))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_a_half_type_is_exact(built_variant, dtype):
    """x, A and y take each of the 65,536 bit patterns. The products with 1 are exact, so all bits are known."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    # VDPBF16PS treats denormal numbers as zero, as its manual says. The others must keep them.
    flushes = built_variant[1] == "avx512bf16" and dtype == torch.bfloat16
    if flushes:
        finite = finite[(finite.abs() >= torch.finfo(dtype).tiny) | (finite == 0)]
    one = torch.ones(1, 1, dtype=dtype)
    single = random_b(torch.Generator().manual_seed(0), 1, 1, 1.0, torch.float32)
    single.values.fill_(1.0)
    batch = BatchWeights(torch.arange(len(finite), dtype=torch.int32), torch.ones(len(finite), 1))
    operand = NativeOperand([Part(one, [single], 0, 1, 0)], *built_variant)
    y = torch.zeros(len(finite), 1, dtype=dtype)
    operand.add_delta(y, finite[:, None].contiguous(), batch)  # 0 + 1·1·x
    assert torch.equal(y[:, 0], finite)
    y = finite[:, None].clone()
    operand.add_delta(y, torch.zeros_like(y), batch)  # y + 0
    assert torch.equal(y[:, 0], finite)
    wide = random_b(torch.Generator().manual_seed(0), len(finite), 1, 1.0, torch.float32)
    wide.values.fill_(1.0)
    y = finite[None].clone()  # as one row: whole vectors instead of single numbers
    NativeOperand([Part(one, [wide], 0, len(finite), 0)], *built_variant).add_delta(
        y, torch.zeros(1, 1, dtype=dtype), BatchWeights(batch.indices[:1], torch.ones(1, 1))
    )
    assert torch.equal(y[0], finite)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_stored_value_of_a_half_type_is_packed(built_variant, value_dtype):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(value_dtype)
    finite = patterns[patterns.isfinite()]
    b = random_b(torch.Generator().manual_seed(0), len(finite), 1, 1.0, value_dtype)
    b.values.copy_(finite)
    one = torch.ones(1, 1)
    for n in (1, 5, 17):  # one to four rows take another path than more
        y = torch.zeros(n, len(finite))
        batch = BatchWeights(torch.arange(n, dtype=torch.int32), torch.ones(n, 1))
        NativeOperand([Part(one, [b], 0, len(finite), 0)], *built_variant).add_delta(y, one.expand(n, 1), batch)
        assert torch.equal(y, finite.float().expand(n, -1))


# --- bit-identical results --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [8, 64, 100, 200])
def test_the_bits_of_a_row_do_not_depend_on_other_rows(built_variant, dtype, rank):
    case = make_case(rank, dtype=dtype, value_dtype=dtype, shapes=((rank, 300),), d_in=700, n=70, idle=0.5)
    operand = NativeOperand(case.parts, *built_variant)
    together = case.fresh_y()
    operand.add_delta(together, case.x, case.batch)
    for rows in ([0], [69], [3, 4], [1, 30, 69], list(range(5)), list(range(40, 57)), list(range(0, 70, 2))):
        y = case.fresh_y()[rows]
        batch = BatchWeights(torch.arange(len(rows), dtype=torch.int32), case.batch.weights[rows].contiguous())
        operand.add_delta(y, case.x[rows], batch)
        assert torch.equal(bits(y), bits(together[rows])), rows


@pytest.mark.parametrize("n", [1, 16, 100])
def test_any_number_of_threads_gives_the_same_bits(built_variant, n):
    case = make_case(7, shapes=((64, 700), (32, 130), (64, 40)), d_in=600, n=n)
    operand = NativeOperand(case.parts, *built_variant)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(case.fresh_y())
            operand.add_delta(results[-1], case.x, case.batch)
    finally:
        torch.set_num_threads(before)
    assert_right(case, results[0])
    for y in results[1:]:
        assert torch.equal(bits(y), bits(results[0]))


@needs_native
def test_operands_used_from_several_python_threads_at_once():
    random_cases = [
        make_case(seed, shapes=((8 * seed + 8, 300 + seed),), d_in=64 * seed + 1, n=4 * seed + 1) for seed in range(6)
    ]
    operands = [prepare(case.parts, "native") for case in random_cases]
    expected = [result(case, (cpu_library.load(), operands[0].variant)) for case in random_cases]
    wrong = []

    def work(i: int) -> None:
        for turn in range(60):
            k = (i + turn) % len(random_cases)
            y = random_cases[k].fresh_y()
            operands[k].add_delta(y, random_cases[k].x, random_cases[k].batch)
            if not torch.equal(bits(y), bits(expected[k])):
                wrong.append((i, k))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# --- the library ------------------------------------------------------------------------------------------------


def test_a_missing_library(tmp_path):
    with pytest.raises(cpu_library.NotUsable, match="was not built: install a C\\+\\+ compiler"):
        cpu_library.load(tmp_path / "_cpu.so")


def test_a_file_that_is_not_a_library(tmp_path):
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(cpu_library.NotUsable, match="could not be loaded"):
        cpu_library.load(path)


@needs_compiler
def test_a_library_built_from_other_sources(tmp_path):
    source, path = tmp_path / "other.cpp", tmp_path / "_cpu.so"
    source.write_text(
        f'extern "C" int loraf_kernels_interface() {{ return {cpu_library.INTERFACE + 1}; }}\n', encoding="utf-8"
    )
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", path], check=True, timeout=60)
    with pytest.raises(cpu_library.NotUsable, match="was built from other sources"):
        cpu_library.load(path)


def test_without_the_library_auto_selects_torch_and_gives_the_reason(monkeypatch, tmp_path):
    from loraf_serve import kernels

    missing = tmp_path / "_cpu.so"
    load = cpu_library.load
    monkeypatch.setattr(cpu_library, "load", lambda: load(missing))
    assert "was not built" in kernels.why_not_native()
    assert kernels.fastest() == "torch"
    assert type(prepare(make_case(0).parts)) is kernels.KERNELS["torch"]
    with pytest.raises(ValueError, match="the native kernel cannot be used: _cpu.so was not built"):
        prepare(make_case(0).parts, "native")


@needs_native
def test_a_variant_that_this_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="this processor runs plain.*not 'sve'"):
        NativeOperand(make_case(0).parts, variant="sve")


@needs_native
def test_threads_are_shared_with_torch():
    """A process has one OpenMP runtime. Two would each keep as many threads as there are cores.

    Runs in a separate process, because other tests' libraries may load another runtime.
    """
    program = "from loraf_serve.kernels import cpu_library; cpu_library.load(); print(open('/proc/self/maps').read())"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = ("libgomp", "libiomp", "libomp")
    runtimes = {line.split()[-1] for line in process.stdout.splitlines() if any(name in line for name in names)}
    assert len(runtimes) == 1, runtimes


@needs_native
def test_a_rank_whose_counts_do_not_fit_is_refused():
    """A row with 65,536 nonzeros has the length 0 in 16 bits: the packed layer was written beyond its end."""
    for rank, fits in ((65_535, True), (65_536, False)):
        b = SparseB.from_positions(torch.arange(rank), torch.ones(rank), (3, rank))  # the first row is full
        part = Part(torch.full((rank, 1), 1 / 256), [b], 0, 3, 0)
        if not fits:
            with pytest.raises(ValueError, match="above the native kernel's limit of 65535"):
                NativeOperand([part])
            continue
        y = torch.zeros(1, 3)
        batch = BatchWeights(torch.zeros(1, dtype=torch.int32), torch.ones(1, 1))
        NativeOperand([part]).add_delta(y, torch.ones(1, 1), batch)
        torch.testing.assert_close(y, torch.tensor([[rank / 256, 0.0, 0.0]]))
