"""The resident backend's GPU memory, without an engine. Without a GPU it runs in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loraf.errors import BaseMismatch
from loraf_serve import kernels
from loraf_serve.vllm.resident.weights import StepWeights, TaskWeights
from tests.loraf_serve.kernel_cases import disjoint_bs
from tests.tools import needs

gpu_module = pytest.importorskip("loraf_serve.vllm.resident.gpu", reason=needs("Triton"))

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BANDS = {"qkv": [(0, 40), (40, 24), (64, 24)], "down": [(0, 33)], "other": []}
D_IN, ROWS = 48, 24


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def parts_of(layer: str, bands: list[int], rank: int, tasks: int, seed: int) -> list[kernels.Part]:
    g = torch.Generator().manual_seed(seed)
    parts = []
    for number in bands:
        offset, columns = BANDS[layer][number]
        b_of_tasks = disjoint_bs(g, tasks, columns, rank, 0.2, torch.float32)
        parts.append(kernels.Part(torch.randn(rank, D_IN, generator=g) / 7, b_of_tasks, 0, columns, offset))
    return parts


class Stand:
    """Two adapters, and the weights of a step: ids 1 and 2 are sets of "a", 3 is a set of "b", 9 is vLLM's warm-up."""

    def __init__(self):
        self.gpu = gpu_module.Gpu(BANDS, 32, ROWS, DEVICE)
        self.parts = {
            "a": {"qkv": parts_of("qkv", [0, 1, 2], 16, 2, 1), "down": parts_of("down", [0], 16, 2, 2)},
            "b": {"qkv": parts_of("qkv", [2], 24, 3, 3)},
        }
        weights = {1: ("a", [1, 0]), 2: ("a", [0.5, -2]), 3: ("b", [3, 0, 1])}
        self.task_weights: dict[int, TaskWeights | None] = {
            lora_id: TaskWeights(name, np.array(values, np.float32)) for lora_id, (name, values) in weights.items()
        }
        self.task_weights[9] = None
        self.step = StepWeights(self.task_weights.__getitem__)
        self.step.gpu = self.gpu

    def load(self, digest: str) -> None:
        with self.gpu.loading():
            self.gpu.put(digest, {name: self.gpu.operand(name, parts) for name, parts in self.parts[digest].items()})

    def update(self, ids: list[int]) -> None:
        self.step.update_metadata(SimpleNamespace(index_mapping=ids), [None], 1, 0)

    def check(self, layer: str, ids: list[int]) -> None:
        """Compares a step with the torch kernel on the CPU."""
        g = torch.Generator().manual_seed(len(ids))
        width = max((offset + columns for offset, columns in BANDS[layer]), default=5)
        x, y = torch.randn(len(ids), D_IN, generator=g), torch.randn(len(ids), width, generator=g)
        expected = y.clone()
        self.update(ids)
        for digest, batch in self.step.active:
            if layer in self.parts[digest]:
                kernels.prepare(self.parts[digest][layer], "torch").add_delta(expected, x, batch)
        actual = y.to(DEVICE, copy=True)
        self.gpu.add_deltas(layer, actual, x.to(DEVICE))
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
        acting = [lora_id for lora_id in ids if self.task_weights.get(lora_id) is not None]
        assert torch.equal(expected, y) == (not any(layer in self.parts[self.task_weights[i].digest] for i in acting))


@pytest.fixture
def stand() -> Stand:
    stand = Stand()
    stand.load("a")
    stand.load("b")
    return stand


@pytest.mark.parametrize("layer", list(BANDS))
@pytest.mark.parametrize("ids", [[1], [0, 1, 2, 3, 0, 3, 2], [3] * ROWS, [0, 0], [9, 9, 9], [0, 9, 2]], ids=str)
def test_each_row_gets_the_delta_of_its_set(stand, layer, ids):
    stand.check(layer, ids)


def test_a_step_without_adapters_launches_nothing_but_a_warm_up_step_does(stand):
    stand.update([1])
    assert stand.gpu.acting
    stand.update([0, 0])
    assert not stand.gpu.acting
    stand.update([9, 0])  # a graph captured in it must contain the kernels
    assert stand.gpu.acting and stand.step.active == []


def test_a_graph_with_the_kernels_adds_nothing_in_a_step_without_adapters(stand):
    stand.update([1, 1])
    stand.update([0, 0])
    stand.gpu.acting = True  # as when such a graph is replayed, which runs no Python
    y = torch.randn(2, 88)
    actual = y.to(DEVICE, copy=True)
    stand.gpu.add_deltas("qkv", actual, torch.randn(2, D_IN).to(DEVICE))
    assert torch.equal(actual.cpu(), y)


def test_an_adapter_that_reuses_an_index_does_not_act_on_old_rows(stand):
    stand.update([1, 2])
    stand.gpu.remove("a")
    stand.parts["c"] = stand.parts["b"]
    stand.load("c")  # takes the index of "a"
    y = torch.randn(2, 88)
    actual = y.to(DEVICE, copy=True)
    stand.gpu.add_deltas("qkv", actual, torch.randn(2, D_IN).to(DEVICE))
    assert torch.equal(actual.cpu(), y)


def test_loading_or_removing_an_adapter_does_not_affect_the_other(stand):
    stand.load("a")  # it is loaded already
    stand.gpu.remove("b")
    stand.gpu.remove("b")
    stand.gpu.remove("never there")
    stand.check("qkv", [0, 1, 2])
    stand.load("b")
    stand.check("qkv", [1, 3, 0, 3])


def test_a_checkpoint_beyond_the_engines_limits_is_refused():
    gpu = Stand().gpu
    gpu.require(SimpleNamespace(rank=32, tasks=[None] * 16), "ckpt")
    with pytest.raises(BaseMismatch) as error:
        gpu.require(SimpleNamespace(rank=33, tasks=[None] * 17), "ckpt")
    assert [problem.field for problem in error.value.problems] == ["rank", "tasks"]
    assert "rank 33 is beyond this engine's largest, 32" in str(error.value)
    assert "17 tasks exceed the 16" in str(error.value)


def test_a_part_outside_the_layers_bands_is_refused(stand):
    (part,) = parts_of("down", [0], 16, 2, 0)
    with pytest.raises(ValueError, match="not one of the layer's bands"):
        stand.gpu.operand("down", [dataclasses.replace(part, offset=1)])
