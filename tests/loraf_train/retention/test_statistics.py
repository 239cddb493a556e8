"""The statistics' file, and the change of logits that follows from them."""

from __future__ import annotations

import pytest
import torch

from loraf.errors import CorruptCheckpoint
from loraf.files import strict_safetensors
from loraf_train.retention.extent import stored_bytes
from loraf_train.retention.statistics import ModuleStatistics, decode, encode, mean_square_change, rounded

SHAPES = {"a": (12, 4), "b": (20, 4)}


def drawn(seed: int = 0) -> dict[str, ModuleStatistics]:
    generator = torch.Generator().manual_seed(seed)

    def of(d_out: int, rank: int) -> ModuleStatistics:
        directions = torch.randn(d_out, min(16, d_out), generator=generator)
        factor = torch.randn(rank, rank, generator=generator).tril()
        return ModuleStatistics(directions, torch.rand(d_out, generator=generator), factor)

    return {name: of(*shape) for name, shape in SHAPES.items()}


def test_the_change_is_the_trace_of_the_written_formula():
    statistics = drawn()
    deltas = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected = 0.0
    for name, s in statistics.items():
        g = s.directions @ s.directions.t() + s.rest.diag()
        c = s.factor @ s.factor.t()
        expected += float(torch.trace(g @ deltas[name] @ c @ deltas[name].t()))
    assert mean_square_change(statistics, deltas) == pytest.approx(expected, rel=1e-5)


def test_a_file_is_read_back_rounded_and_as_small_as_promised():
    statistics = drawn()
    data = encode(statistics)
    read = decode(data, SHAPES, "file")
    for name, expected in rounded(statistics).items():
        for part in ("directions", "rest", "factor"):
            assert torch.equal(getattr(read[name], part), getattr(expected, part))
    deltas = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    assert mean_square_change(read, deltas) == pytest.approx(mean_square_change(statistics, deltas), rel=2e-2)
    assert encode(read) == data
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == stored_bytes(SHAPES)


def test_mistral_7b_needs_no_more_than_44_mb_a_task():
    of_layer = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 4096}
    shapes = {f"{layer}.{name}": (d_out, 64) for layer in range(32) for name, d_out in of_layer.items()}
    rows = 32 * (3 * 4096 + 2 * 1024 + 2 * 14336)
    assert stored_bytes(shapes) == rows * (16 + 2) + 224 * (16 * 4 + 64 * 65) < 44e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.rest"), "not those of the checkpoint's modules .a.rest."),
        (lambda t: t.update({"a.rest": t["a.rest"].float()}), "is torch.float32 .12., not torch.bfloat16 .12."),
        (lambda t: t.update({"b.factor": t["b.factor"][1:].contiguous()}), "b.factor: is torch.bfloat16 .9."),
        (lambda t: t.update({"b.rest": t["b.rest"] * torch.nan}), "b.rest: holds numbers that are not finite"),
        (lambda t: t.update({"b.scales": -t["b.scales"]}), "b.scales: holds negative numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message):
    tensors = {name: t.clone() for name, t in strict_safetensors.parse(memoryview(bytearray(encode(drawn())))).items()}
    change(tensors)
    with pytest.raises(CorruptCheckpoint, match=message) as refusal:
        decode(
            strict_safetensors.encode(sorted(tensors.items(), key=lambda t: -t[1].itemsize)), SHAPES, "x.safetensors"
        )
    assert all(p.file == "x.safetensors" and "protect" in p.remedy for p in refusal.value.problems)


@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_bytes_that_are_no_safetensors_file_are_refused(data):
    with pytest.raises(CorruptCheckpoint, match="is not a file of statistics"):
        decode(data, SHAPES, "x")


def test_statistics_that_would_protect_nothing_are_refused():
    zero = {
        n: ModuleStatistics(torch.zeros(shape[0], 12), torch.zeros(shape[0]), s.factor)
        for (n, shape), s in zip(SHAPES.items(), drawn().values(), strict=True)
    }
    with pytest.raises(CorruptCheckpoint, match="x: is all zero, so it would protect nothing"):
        decode(encode(zero), SHAPES, "x")
    one = zero | {"a": drawn()["a"]}
    assert decode(encode(one), SHAPES, "x").keys() == SHAPES.keys()  # a single module may not matter
