"""`benchmarks/compositions.py`: what each system adds to a weight matrix."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compositions import MIX, NAMES, Peft, error, exact, llama_cpp, lorax_linear
from tests.standins import make_model

WEIGHTS = list(MIX.values())


def loras(shared: bool, alphas=(64.0, 64.0, 64.0, 64.0)):
    drawn = torch.Generator().manual_seed(0)
    a = [torch.randn(8, 24, generator=drawn) for _ in NAMES]
    b = [torch.randn(16, 8, generator=drawn) for _ in NAMES]
    return [(a[0] if shared else a[i], b[i], alpha / 64) for i, alpha in enumerate(alphas)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_list_of_adapters_and_scales_is_the_exact_sum(shared):
    assert error(llama_cpp(loras(shared), WEIGHTS), exact(loras(shared), WEIGHTS)) < 1e-6


def test_sums_of_matrices_are_the_sum_of_products_only_with_one_a_and_weights_that_add_up_to_one():
    half = [0.25] * 4
    assert error(lorax_linear(loras(True), half), exact(loras(True), half)) < 1e-6
    total = sum(WEIGHTS)
    assert torch.allclose(lorax_linear(loras(True), WEIGHTS).double(), total * exact(loras(True), WEIGHTS), atol=1e-4)
    assert error(lorax_linear(loras(False), half), exact(loras(False), half)) > 0.5
    unequal = loras(True, (64.0, 32.0, 128.0, 64.0))
    assert error(lorax_linear(unequal, half), exact(unequal, half)) > 0.1


def test_pefts_cat_is_the_exact_sum_and_its_rank_the_sum_of_ranks(tmp_path):
    peft = Peft(make_model("mistral", tmp_path / "model"), None)
    peft.compose(WEIGHTS, "cat")
    for layer in peft.layers:
        reference = exact(peft.loras(layer), WEIGHTS)
        assert error(peft.delta(layer, "cat"), reference) < 1e-6
    assert peft.bytes_of("cat") == len(NAMES) * peft.bytes_of(NAMES[0])
