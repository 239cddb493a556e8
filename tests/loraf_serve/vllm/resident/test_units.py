"""The resident backend without an engine: weights of a step, parts of a layer, the self-check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.lora.layers import LoRAMapping

from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from loraf_serve import kernels
from loraf_serve.vllm.resident import selfcheck
from loraf_serve.vllm.resident.manager import _kernel_part
from loraf_serve.vllm.resident.weights import StepWeights, TaskWeights
from loraf_serve.vllm.worker import parts
from tests.standins import make_model, random_checkpoint
from tests.tools import needs

# LoRA id → (adapter, weights); 9 is vLLM's warm-up, 5 a set whose weights are all zero.
TASK_WEIGHTS = {
    1: TaskWeights("a", np.array([1, 0], np.float32)),
    2: TaskWeights("a", np.array([0.5, -2], np.float32)),
    3: TaskWeights("b", np.array([3, 0, 1], np.float32)),
    5: TaskWeights("b", np.array([0, 0, 0], np.float32)),
    9: None,
}


@given(st.lists(st.sampled_from([0, *TASK_WEIGHTS]), max_size=40))
def test_each_token_of_a_step_has_its_own_weights(ids: list[int]) -> None:
    step = StepWeights(TASK_WEIGHTS.__getitem__)
    step.update_metadata(LoRAMapping(tuple(ids), (), is_prefill=True), [None], 1, 0)
    assert step.tokens == len(ids)
    actual = {
        (digest, index): weights
        for digest, batch in step.active
        for index, weights in zip(batch.indices.tolist(), batch.weights.tolist(), strict=True)
    }
    of_tokens = [TASK_WEIGHTS.get(lora_id) for lora_id in ids]
    expected = {(w.digest, i): w.weights.tolist() for i, w in enumerate(of_tokens) if w and w.weights.any()}
    assert actual == expected
    assert all(batch.count for _, batch in step.active)


def test_task_weights_are_scaled_and_in_the_checkpoints_order(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    task_weights = TaskWeights.of("digest", manifest, TaskSet.parse("code:2+math:-0.5", manifest.task_names))
    assert manifest.task_names == ("math", "nlu", "code") and manifest.rank == 16
    assert task_weights.weights.tolist() == [-0.5 * 16 / 16, 0, 2 * 24 / 16]


@given(st.lists(st.integers(0, 60), unique=True))
def test_runs_contain_exactly_the_numbers(numbers: list[int]) -> None:
    runs = parts._runs(torch.tensor(numbers, dtype=torch.int64))
    assert [number for first, stop in runs for number in range(first, stop)] == numbers
    assert all(stop != following for (_, stop), (following, _) in zip(runs, runs[1:], strict=False))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root: Path = tmp_path_factory.mktemp("resident")
    make_model("mistral", root / "model")
    return random_checkpoint(root / "checkpoint", root / "model")


class Faulty(kernels.Operand):
    """A correct operand followed by a fault."""

    def __init__(self, operand: kernels.Operand, fault):
        self._operand, self._fault, self.nbytes, self.device = operand, fault, operand.nbytes, operand.device

    def add_delta(self, y, x, batch) -> None:
        self._operand.add_delta(y, x, batch)
        self._fault(y)


def layer(checkpoint: Checkpoint, kernel: str, dtype: torch.dtype):
    """Returns operand, layer parts and A (module → A) of the fused gate and up projection."""
    names = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    layer_parts = [parts.LayerPart(name, (0, 192), (0, 128), 192 * i) for i, name in enumerate(names)]
    projections = {name: checkpoint.projection_of(name).to(dtype) for name in names}
    operand = kernels.prepare([_kernel_part(p, projections[p.module], checkpoint.tasks) for p in layer_parts], kernel)
    return operand, layer_parts, projections


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", sorted({"torch", "reference", kernels.fastest()}))
def test_a_correct_kernel_passes_the_self_check(checkpoint: Checkpoint, kernel: str, dtype: torch.dtype) -> None:
    operand, layer_parts, projections = layer(checkpoint, kernel, dtype)
    for seed in range(5):
        assert selfcheck.difference(operand, layer_parts, projections, checkpoint.tasks, 384, seed) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gpu_kernel_passes_the_self_check(
    checkpoint: Checkpoint, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_kernel = pytest.importorskip("loraf_serve.kernels.triton_kernel", reason=needs("Triton"))
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # see tests/conftest.py
    _, layer_parts, projections = layer(checkpoint, "torch", dtype)
    operand = triton_kernel.TritonOperand(
        [_kernel_part(p, projections[p.module], checkpoint.tasks) for p in layer_parts]
    )
    assert selfcheck.difference(operand, layer_parts, projections, checkpoint.tasks, 384, 0) is None
    assert selfcheck.difference(Faulty(operand, off_in_one_part), layer_parts, projections, checkpoint.tasks, 384, 0)


def off_in_one_part(y: torch.Tensor) -> None:
    y[:, 192:] *= 1.02


def adds_to_base_rows(y: torch.Tensor) -> None:
    y[1, 7] += 1e-3


def swaps_the_parts(y: torch.Tensor) -> None:
    y.copy_(y.roll(192, 1))


def does_nothing(y: torch.Tensor) -> None:
    y.zero_()


def not_a_number(y: torch.Tensor) -> None:
    y[0] = torch.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [off_in_one_part, adds_to_base_rows, swaps_the_parts, does_nothing, not_a_number])
def test_a_faulty_kernel_fails_the_self_check(checkpoint: Checkpoint, dtype: torch.dtype, fault) -> None:
    operand, layer_parts, projections = layer(checkpoint, "torch", dtype)
    assert selfcheck.difference(Faulty(operand, fault), layer_parts, projections, checkpoint.tasks, 384, 0)


def test_an_adapter_with_one_part_must_not_touch_the_other(checkpoint: Checkpoint) -> None:
    operand, layer_parts, projections = layer(checkpoint, "torch", torch.float32)
    words = selfcheck.difference(operand, layer_parts[:1], projections, checkpoint.tasks, 384, 0)
    assert words == "adds to an output that the adapter does not touch"
