"""ΔW(S) and merged weights, compared with loops over single numbers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.delta import (
    Merger,
    OriginalWeights,
    combined_b,
    delta_weight,
    shared_weights,
    target_modules,
    task_scale,
)
from loraf.errors import BaseMismatch, CorruptCheckpoint
from loraf.tasksets import TaskSet
from tests.loraf import small_checkpoints as small
from tests.loraf.small_checkpoints import BASE, RANK, SHAPES, TASKS, UP, Q

SETS = ["base", "math", "nlu", "code", "math+nlu", "all", "math:0.5+code:-2", "nlu:16+code:0.001", "math:-1+nlu+code:3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("delta")
    small.make(folder)
    return Checkpoint.open(folder)


def parse(text: str) -> TaskSet:
    return TaskSet.parse(text, TASKS)


def slow_delta(checkpoint: Checkpoint, module: str, task_set: TaskSet) -> np.ndarray:
    """Computes ΔW = Σ_t w_t·(α_t/r)·B_t·A in double precision, one product at a time."""
    d_out, d_in = SHAPES[module]
    a = checkpoint.projection_of(module).double().tolist()
    delta = [[0.0] * d_in for _ in range(d_out)]
    for name, weight in task_set.weights:
        alpha = checkpoint.manifest.task(name).alpha
        b = checkpoint.tasks[name][module]
        for row, col, value in zip(b.rows.tolist(), b.cols.tolist(), b.values.tolist(), strict=True):
            for j in range(d_in):
                delta[row][j] += weight * alpha / RANK * value * a[col][j]
    return np.array(delta)


@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("text", SETS)
def test_delta_equals_the_slow_reference(checkpoint, module, text):
    expected = slow_delta(checkpoint, module, parse(text))
    found = delta_weight(checkpoint, module, parse(text))
    assert found.dtype == torch.float32
    assert tuple(found.shape) == SHAPES[module]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6 * max(1, np.abs(expected).max()))
    assert bool(found.any()) == (text != "base")


def test_passing_a_does_not_change_the_result(checkpoint):
    a = checkpoint.projection_of(Q)
    assert torch.equal(delta_weight(checkpoint, Q, parse("all"), a), delta_weight(checkpoint, Q, parse("all")))
    rounded = delta_weight(checkpoint, Q, parse("all"), a.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, combined_b(checkpoint, Q, parse("all")) @ a.bfloat16().float())


def test_tasks_own_disjoint_positions(checkpoint):
    for module, (d_out, _) in SHAPES.items():
        k = manifests.positions_per_matrix(small.SPARSITY, d_out, RANK)
        masks = {name: set(checkpoint.tasks[name][module].positions.tolist()) for name in TASKS}
        assert all(len(mask) == k for mask in masks.values())
        for one, other in itertools.combinations(TASKS, 2):
            assert not masks[one] & masks[other]
        together = combined_b(checkpoint, module, parse("all")).view(-1)
        for name, mask in masks.items():
            alone = combined_b(checkpoint, module, parse(name)).view(-1)
            assert set(torch.nonzero(alone).flatten().tolist()) <= mask
            inside = torch.tensor(sorted(mask))
            assert torch.equal(together[inside], alone[inside])


WEIGHT = st.floats(-16, 16, width=32)


@settings(max_examples=25, deadline=None)
@given(st.tuples(WEIGHT, WEIGHT, WEIGHT))
def test_delta_is_linear_in_the_weights(checkpoint, weights):
    a = checkpoint.projection_of(UP)
    parts = [w * delta_weight(checkpoint, UP, parse(name), a).double() for name, w in zip(TASKS, weights, strict=True)]
    expected = torch.stack(parts).sum(0)
    task_set = TaskSet.of(dict(zip(TASKS, weights, strict=True)), TASKS)
    found = delta_weight(checkpoint, UP, task_set, a).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * (1 + expected.abs().max().item()))


def test_task_scale_by_hand():
    assert task_scale(64.0, 16) == 4.0
    assert task_scale(16.0, 64, 0.5) == 0.125
    assert task_scale(16.0, 64, -2.0) == -0.5


# --- merging ----------------------------------------------------------------------------------------------------


class Layered(torch.nn.Module):
    """A model whose modules have the names and shapes of the small checkpoint, plus one more module."""

    def __init__(self, dtype: torch.dtype, seed: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(shape):
            made = torch.nn.Linear(shape[1], shape[0], bias=False)
            made.weight.data = torch.randn(shape, generator=generator)
            return made

        attention = torch.nn.ModuleDict({"q_proj": linear(SHAPES[Q])})
        mlp = torch.nn.ModuleDict({"up_proj": linear(SHAPES[UP])})
        layer = torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp})
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer]), "embed": linear((5, 4))})
        self.to(dtype)


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns the 16 bits of the nearest bfloat16, ties to even, by integer arithmetic."""
    words = values.view(np.uint32).astype(np.uint64)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("text", SETS)
def test_merging_rounds_the_float32_sum_once(checkpoint, text):
    model = Layered(torch.bfloat16)
    originals = {name: model.get_submodule(name).weight.detach().float().numpy().copy() for name in SHAPES}
    Merger(model, checkpoint).merge(parse(text))
    for name in SHAPES:
        total = originals[name] + delta_weight(checkpoint, name, parse(text)).numpy()
        found = model.get_submodule(name).weight.detach().view(torch.int16).numpy().view(np.uint16)
        assert (found == round_to_bfloat16(total)).all()


def test_rounding_twice_would_be_detected(checkpoint):
    """The test above could not fail otherwise."""
    model = Layered(torch.bfloat16)
    weight = model.get_submodule(Q).weight.detach()
    delta = delta_weight(checkpoint, Q, parse("all"))
    once = (weight.float() + delta).bfloat16()
    assert not torch.equal(once, weight + delta.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_merging_does_not_depend_on_what_was_merged_before(checkpoint, dtype, keep):
    """Any sequence of merges to a set gives the same bits, and base restores the model's own."""
    expected = {}
    for text in SETS:
        fresh = Layered(dtype)
        Merger(fresh, checkpoint).merge(parse(text))
        expected[text] = bits(fresh)
    assert len({str(sorted(b.items())) for b in expected.values()}) == len(SETS)
    model = Layered(dtype)
    start = bits(model)
    assert expected["base"] == start
    merger = Merger(model, checkpoint, keep_projections=keep)
    assert bits(model) == start
    for text in [*SETS, *SETS[::-1], "base", "all", "all", "math", "base"]:
        merger.merge(parse(text))
        assert bits(model) == expected[text], text
    assert bits(model) == start


def test_two_checkpoints_on_one_model_undo_each_other(checkpoint, tmp_path):
    """The second one adapts fewer modules. What the first one left in the others must be undone."""
    narrow = Checkpoint.create(tmp_path, BASE, RANK, {Q: SHAPES[Q]}, seed=9)
    drawn = small.values(seed=9, shapes={Q: SHAPES[Q]})
    narrow.add_task("art", drawn["math"], alpha=8.0, sparsity=small.SPARSITY)
    art = TaskSet.parse("art", ("art",))
    alone = Layered(torch.bfloat16)
    Merger(alone, narrow).merge(art)
    model = Layered(torch.bfloat16)
    start = bits(model)
    originals = OriginalWeights(model)
    first = Merger(model, checkpoint, originals=originals)
    first.merge(parse("all"))
    with_all = bits(model)
    second = Merger(model, narrow, originals=originals)  # built while the model is not the base
    assert bits(model) == with_all
    second.merge(art)
    assert bits(model) == bits(alone)
    first.merge(parse("all"))
    assert bits(model) == with_all
    second.merge(TaskSet())
    assert bits(model) == start


def test_merging_leaves_no_gradients(checkpoint):
    model = Layered(torch.float32)
    Merger(model, checkpoint).merge(parse("math"))
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_that_does_not_fit_is_refused_naming_every_module(checkpoint):
    model = Layered(torch.float32)
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp["up_proj"] = torch.nn.Linear(25, SHAPES[UP][0])
    del model.get_submodule("model.layers.0.self_attn")["q_proj"]
    before = bits(model)
    for use in (lambda: Merger(model, checkpoint), lambda: list(target_modules(model, checkpoint))):
        with pytest.raises(BaseMismatch) as caught:
            use()
        assert {problem.field for problem in caught.value.problems} == {Q, UP}
        assert "is not in the model" in str(caught.value)
        assert "has shape (17, 25), not (17, 24)" in str(caught.value)
    assert bits(model) == before
    mlp["up_proj"] = torch.nn.ReLU()  # a module without weights
    with pytest.raises(BaseMismatch, match="up_proj"):
        Merger(model, checkpoint)


def test_a_wrong_projection_is_not_merged(tmp_path):
    small.make(tmp_path)
    manifest = manifests.read(tmp_path)
    small.write_manifest(
        tmp_path, dataclasses.replace(manifest, projection=dataclasses.replace(manifest.projection, seed=5))
    )
    other = Checkpoint.open(tmp_path)
    model = Layered(torch.float32)
    start = bits(model)
    with pytest.raises(CorruptCheckpoint, match="is not the A"):
        Merger(model, other)
    with pytest.raises(CorruptCheckpoint, match="is not the A"):
        Merger(model, other, keep_projections=False).merge(parse("math"))
    assert bits(model) == start


# --- shared weights ---------------------------------------------------------------------------------------------


class Tied(Layered):
    """The adapted up_proj shares its weight with an embedding, as a tied lm_head does."""

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype)
        self.table = torch.nn.Embedding(*SHAPES[UP])
        self.table.weight = self.get_submodule(UP).weight


def test_a_shared_weight_is_changed_for_the_adapted_module_alone(checkpoint):
    separate, tied = Layered(torch.bfloat16), Tied(torch.bfloat16)
    original = tied.table.weight
    bits_before = bits(tied)
    originals = OriginalWeights(tied)
    merger, other = (Merger(tied, checkpoint, originals=originals) for _ in range(2))
    reference = Merger(separate, checkpoint)
    for text in ("all", "math", "nlu:-2"):
        for one in (merger, other):  # the second finds a weight that no longer is shared
            one.merge(parse(text))
            reference.merge(parse(text))
            for name in SHAPES:
                assert torch.equal(tied.get_submodule(name).weight, separate.get_submodule(name).weight), (text, name)
            assert tied.table.weight is original
            assert not torch.equal(tied.get_submodule(UP).weight, original)
    merger.merge(TaskSet())
    assert tied.get_submodule(UP).weight is original
    assert bits(tied) == bits_before
    merger.merge(parse("all"))
    originals.release()
    assert tied.get_submodule(UP).weight is original and originals.resident_bytes == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shared_weights_are_found_wherever_they_lie(device):
    tied = Tied(torch.float32).to(device)
    tied.get_submodule(UP).weight = tied.table.weight  # moving to another device has made two
    assert shared_weights(tied) == {UP: ("table",), "table": (UP,)}
    assert shared_weights(Layered(torch.float32).to(device)) == {}


def test_float64_weights_get_a_float64_delta(checkpoint):
    model = Layered(torch.float64)
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in SHAPES}
    Merger(model, checkpoint).merge(parse("math:0.3+nlu"))
    for name in SHAPES:
        expected = originals[name].numpy() + slow_delta(checkpoint, name, parse("math:0.3+nlu"))
        np.testing.assert_allclose(model.get_submodule(name).weight.detach().numpy(), expected, rtol=1e-13, atol=1e-13)
