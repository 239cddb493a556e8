"""The grouped LoRA products against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from loraf_serve.vllm.slots.punica_cpu import GroupedPunicaWrapperCPU, group_rows

IDS = [None, 11, 12, 13]  # slot 0 is free


def wrapper_for(ids: list[int]) -> GroupedPunicaWrapperCPU:
    """Returns a wrapper with the adapter id of each row (0 for none) as its mapping."""
    wrapper = GroupedPunicaWrapperCPU(256, max_batches=64, device="cpu")
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, len(IDS) + 1, 100)
    return wrapper


def by_rows(y, x, a, b, slices, ids, scale=1.0):
    """Returns y + scale · x Aᵀ Bᵀ, row by row and slice by slice, in float64."""
    y = y.double().clone()
    for row, adapter in enumerate(ids):
        if adapter == 0:
            continue
        slot, offset = IDS.index(adapter), 0
        for a_i, b_i, size in zip(a, b, slices, strict=True):
            delta = x[row].double() @ a_i[slot, 0].double().T @ b_i[slot, 0].double().T
            y[row, offset : offset + size] += scale * delta
            offset += size
    return y


def random_layers(slices, d_in=24, rank=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(slices))
    a = [torch.randn(len(IDS), 1, rank, d_in, generator=generator).to(dtype) for _ in slices]
    b = [torch.randn(len(IDS), 1, size, rank, generator=generator).to(dtype) for size in slices]
    return a, b


BATCHES = {
    "base only": [0] * 5,
    "one adapter": [11] * 6,
    "prefills": [11] * 4 + [0] * 3 + [12] * 5 + [13],
    "decodes, mixed": [11, 0, 12, 11, 0, 13, 12, 11],
    "last slot next to base": [0, 13, 0],
    "a single row": [12],
}


@pytest.mark.parametrize("slices", [(16,), (32, 16, 16), (20, 20)], ids=["o_proj", "qkv_proj", "gate_up_proj"])
@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
def test_linear_layers_get_each_rows_delta(ids: list[int], slices: tuple[int, ...]) -> None:
    wrapper = wrapper_for(ids)
    a, b = random_layers(slices)
    x, y = torch.randn(len(ids), 24), torch.randn(len(ids), sum(slices))
    expected = by_rows(y, x, a, b, slices, ids, scale=0.5)
    base = [row for row, adapter in enumerate(ids) if adapter == 0]
    untouched = y[base].clone()
    wrapper.add_lora_linear(y, x, a, b, 0.5, slices)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[base], untouched)  # rows without an adapter keep every bit


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
def test_shrink_then_expand_gives_the_same(ids: list[int]) -> None:
    """vLLM calls the two halves separately if LoRA is fully sharded over processes."""
    slices = (12, 8)
    wrapper = wrapper_for(ids)
    a, b = random_layers(slices)
    x, y = torch.randn(len(ids), 24), torch.randn(len(ids), 30)
    expected = y.double().clone()
    expected[:, 10:] = by_rows(y[:, 10:], x, a, b, slices, ids)
    buffers = torch.zeros(2, len(ids), 8)
    wrapper.add_shrink(buffers, x, a, 1.0)
    wrapper.add_expand(y, buffers, b, slices, offset_start=10, add_inputs=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close_to_exact_products() -> None:
    ids, slices = BATCHES["decodes, mixed"], (32, 16, 16)
    a, b = random_layers(slices, dtype=torch.bfloat16)
    x, y = torch.randn(len(ids), 24).bfloat16(), torch.randn(len(ids), 64).bfloat16()
    expected = by_rows(y, x, a, b, slices, ids)
    wrapper_for(ids).add_lora_linear(y, x, a, b, 1.0, slices)
    assert (y.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_contiguous_rows_are_a_slice() -> None:
    groups = dict(group_rows(torch.tensor([2, 2, -1, 0, 1, 0])))
    assert groups[2] == slice(0, 2) and groups[1] == slice(4, 5)
    assert groups[0].tolist() == [3, 5] and len(groups) == 3
