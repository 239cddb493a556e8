"""What is proven about layers, without an engine: the rows that they hold, copies of them, and when they are called."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from loraf.errors import BaseMismatch
from loraf_serve.backends.backend import NotProven
from loraf_serve.vllm.worker import proof, targets
from loraf_serve.vllm.worker.base_weights import BaseWeights
from loraf_serve.vllm.worker.calls import DECODE, MIXED, PREFILL, Calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def products(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns vectors and their products in a dtype, as `proof.products` does."""
    signs = torch.randint(0, 2, (8, weight.shape[1]), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.double(), (signs.to(dtype) @ weight.to(dtype).T).double()


def tolerance(dtype: torch.dtype) -> float:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer = SimpleNamespace(base_layer=SimpleNamespace(quant_method=UnquantizedLinearMethod()))
    return proof._tolerance(layer, dtype)


def changed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns ways in which a layer may hold a weight."""
    rows, columns = torch.arange(len(weight)), torch.arange(weight.shape[1])
    swapped = rows.clone()
    swapped[[3, 4]] = rows[[4, 3]]
    halves = rows.view(2, -1).T.flatten()  # as rotary embeddings are permuted
    return {
        "permuted for rotary embeddings": weight[halves],
        "two rows swapped": weight[swapped],
        "columns reversed": weight[:, columns.flip(0)],
        "scaled": weight * 1.1,
        "a row of zeros": weight * (rows != 5).unsqueeze(1),
        "not a number": torch.where(rows.unsqueeze(1) == 5, torch.nan, weight),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(32, 16), (96, 2000)])
def test_the_same_rows_and_only_they_are_recognized(dtype: torch.dtype, size: tuple[int, int]) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.02
    bias = torch.zeros(len(weight))
    x, y = products(weight, dtype)
    assert proof.same_rows(x, y, bias, weight.to(dtype), tolerance(dtype))
    for way, held in changed(weight).items():
        x, y = products(held, dtype)
        assert not proof.same_rows(x, y, bias, weight.to(dtype), tolerance(dtype)), way


def test_a_copy_of_rows_is_found_in_any_order_and_rows_of_zeros_are_none() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    _, keys = products(weight, torch.bfloat16)
    _, values = products(weight.flip(0), torch.bfloat16)
    _, others = products(torch.randn(24, 40, generator=torch.Generator().manual_seed(3)), torch.bfloat16)
    assert proof.share_a_row(values, keys)
    assert not proof.share_a_row(others, keys)
    assert not proof.share_a_row(torch.zeros_like(keys), torch.cat([keys, torch.zeros_like(keys)], dim=1))


def test_sampled_rows_are_spread_over_the_whole_part() -> None:
    generator = torch.Generator().manual_seed(0)
    assert proof._sample(10, 500, generator) == [(10, 500)]
    runs = proof._sample(1000, 12_000, generator)
    assert len(runs) == 64 and all(0 < stop - first <= 8 for first, stop in runs)
    assert all(first >= 1000 and stop <= 12_000 for first, stop in runs)
    assert max(later[0] - earlier[1] for earlier, later in zip(runs, runs[1:], strict=False)) < 400


def test_weights_of_the_files_are_found_by_vllms_names_and_refused_by_reason(tmp_path: Path) -> None:
    half = torch.randn(6, 4).to(torch.bfloat16)
    tensors = {
        "model.a.weight": half,
        "model.b.weight": torch.zeros(6, 4, dtype=torch.int8),
        "model.a.bias": torch.ones(6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    model = torch.nn.Module()
    weights = BaseWeights(model, str(tmp_path))
    assert "model.a" in weights and "model.c" not in weights
    assert weights.problem("model.a", (6, 4)) is None
    assert weights.rows("model.a", [(0, 1), (4, 6)], (1, 3)).equal(half[[0, 4, 5], 1:3])
    assert "shape (6, 4) in the model's files, (4, 6) in vLLM" in str(weights.problem("model.a", (4, 6)))
    assert "stored as I8" in str(weights.problem("model.b", (6, 4)))
    assert "hold no weight of this name" in str(weights.problem("model.c", (6, 4)))
    (tmp_path / "empty").mkdir()
    assert "no *.safetensors" in str(BaseWeights(model, str(tmp_path / "empty")).problem("model.a", (6, 4)))


def test_no_conversion_of_transformers_changes_a_linear_layers_weight_and_keeps_its_name() -> None:
    """`BaseWeights` takes a weight of the files for the weight of the module of that name."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    kept = set()
    for model_type, conversions in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for conversion in conversions:
            if isinstance(conversion, WeightConverter):
                same = set(conversion.source_patterns) & set(conversion.target_patterns)
                kept |= {(model_type, name) for name in same if ".experts." not in name}
    assert kept == set()


class Layer(torch.nn.Module):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return x


def test_a_layer_counts_as_called_if_it_gets_every_token_of_every_step() -> None:
    layers = {name: Layer() for name in ("all", "prefill only", "some tokens", "never", "twice")}
    model = torch.nn.ModuleDict(layers)
    model["all"].do_not_compile = False
    graphs = SimpleNamespace(_graphs_captured=True)
    calls = Calls(layers, model, SimpleNamespace(cudagraph_manager=graphs))  # type: ignore[arg-type]
    calls.start()
    assert model["all"].do_not_compile and not graphs._graphs_captured
    for tokens, requests in ((3, 1), (1, 1), (4, 2)):
        calls.begin_step(tokens, requests)
        layers["all"].apply(torch.zeros(tokens, 2))
        layers["twice"].apply(torch.zeros(1, tokens, 2))  # vLLM's transformers backend has a batch dimension
        layers["twice"].apply(torch.zeros(tokens + 4, 2), None)  # padded
        if tokens > requests:
            layers["prefill only"].apply(torch.zeros(tokens, 2))
        layers["some tokens"].apply(torch.zeros(1, 2))
    assert calls.kinds() == {PREFILL, DECODE, MIXED}
    assert calls.stop() == {"all", "twice"}
    assert graphs._graphs_captured and model["all"].do_not_compile is False
    assert not any("apply" in vars(layer) for layer in layers.values())


def test_without_a_recorded_step_nothing_counts_as_called() -> None:
    layers = {"a": Layer()}
    calls = Calls(layers, torch.nn.ModuleDict(layers), SimpleNamespace())  # type: ignore[arg-type]
    calls.start()
    assert calls.stop() == set()


def manifest(**shapes: tuple[int, int]) -> SimpleNamespace:
    specs = {f"model.{name}": SimpleNamespace(d_out=d_out, d_in=d_in) for name, (d_out, d_in) in shapes.items()}
    return SimpleNamespace(modules=specs)


def test_modules_are_refused_by_name_once_for_each_reason() -> None:
    shapes = {"model.a": (4, 2), "model.b": (4, 2)}
    reasons = {"model.b": "another order"}
    require = targets.require_layers
    require(manifest(a=(4, 2)), shapes, torch.nn.Module(), "ckpt", reasons.get)
    with pytest.raises(NotProven) as caught:
        require(manifest(a=(4, 2), b=(4, 2), c=(4, 2)), shapes, torch.nn.Module(), "ckpt", reasons.get)
    found = [(problem.field, problem.message, problem.file) for problem in caught.value.problems]
    assert found == [
        ("model.b", "another order", "ckpt"),
        ("model.c", "vLLM applies no LoRA to this layer", "ckpt"),
    ]
    with pytest.raises(BaseMismatch, match="has shape") as mismatch:
        require(manifest(a=(2, 4), b=(4, 2)), shapes, torch.nn.Module(), "ckpt", reasons.get)
    assert not isinstance(mismatch.value, NotProven)  # another backend would not help
