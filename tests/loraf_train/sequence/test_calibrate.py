"""Calibration of a whole small model, against a dense B and plain autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraf.delta import Merger, combined_b, task_scale
from loraf.errors import ConfigError
from loraf.manifest import positions_per_matrix
from loraf.tasksets import TaskSet
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.sequence.calibrate import calibrate
from loraf_train.trainer.order import EpochOrder
from tests.loraf_train import toys
from tests.standins import make_model

SEED = 3
COUNT = 12


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model_folder(request, tmp_path_factory):
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared(model_folder, tmp_path_factory):
    """A float64 model, and a checkpoint with two tasks that own half of the positions."""
    return toys.trainable_base(model_folder, tmp_path_factory.mktemp("ckpt"), one=(12.0, 0.75), two=(20.0, 0.75))


def make_task(steps: int, optimizer: str, batch_size: int = COUNT, **training):
    calibration = {"steps": steps, "optimizer": optimizer, "batch_size": batch_size}
    return toys.task("new", alpha=24.0, sparsity=0.8, calibration=calibration, training=training)


def calibrated(shared, task, on=("one", "two"), **hooks):
    base, checkpoint = shared
    earlier = {module: earlier_tasks(checkpoint, on, module) for module in base.targets}
    return calibrate(base, task, toys.examples(4, COUNT), toys.taken(checkpoint), earlier, SEED, **hooks)


def reference_change(shared, task, on=("one", "two")) -> dict[str, torch.Tensor]:
    """B − B⁰ of every module, written as Algorithm 1: dense B, gradients times Ω, whole batches, torch.optim."""
    base, checkpoint = shared
    everything = TaskSet(tuple((name, 1.0) for name in on))
    dense, feasible = {}, {}
    for module, linear in base.targets.items():
        b0 = combined_b(checkpoint, module, everything).double()
        dense[module] = toys.DenseLoraf(linear, base.projections[module], task_scale(24.0, base.rank), b0)
        omega = torch.ones(linear.out_features, base.rank, dtype=torch.float64)
        for values in checkpoint.tasks.values():
            omega.view(-1)[values[module].positions] = 0
        feasible[module] = omega
    parameters = [layer.b for layer in dense.values()]
    calibration = task.calibration
    if calibration.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=calibration.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=calibration.learning_rate, weight_decay=0.0)
    examples = toys.examples(4, COUNT)
    order = EpochOrder(COUNT, SEED)
    indices: list[int] = []
    with attached(base.model, dense):
        for step in range(calibration.steps):
            if not indices:
                order.set_epoch(step * calibration.batch_size // COUNT)
                indices = list(order)
            drawn, indices = indices[: calibration.batch_size], indices[calibration.batch_size :]
            optimizer.zero_grad()
            base.model(**toys.batch([examples[i] for i in drawn])).loss.backward()
            for module, layer in dense.items():
                layer.b.grad *= feasible[module]
            optimizer.step()
    return {module: layer.b.detach().view(-1) for module, layer in dense.items()}


def ranked(change: torch.Tensor, allowed: torch.Tensor, k: int) -> list[int]:
    order = sorted(allowed.tolist(), key=lambda i: (-abs(change[i].item()), i))
    return sorted(order[:k])


def free(shared, module: str) -> torch.Tensor:
    base, checkpoint = shared
    owned = torch.cat([b[module].positions for b in checkpoint.tasks.values()])
    everything = torch.arange(base.targets[module].out_features * base.rank)
    return everything[~torch.isin(everything, owned)]


@pytest.mark.parametrize("training", [{}, {"micro_batch_size": 5}, {"gradient_checkpointing": True}])
def test_one_step_of_sgd_selects_the_largest_gradients_at_free_positions(shared, training):
    task = make_task(1, "sgd", **training)
    selected = calibrated(shared, task)
    gradient = reference_change(shared, task)  # −learning rate · ∇B ⊙ Ω
    for module, positions in selected.items():
        k = positions_per_matrix(0.8, shared[0].targets[module].out_features, shared[0].rank)
        assert positions.dtype == torch.int64
        assert positions.tolist() == ranked(gradient[module], free(shared, module), k)


@pytest.mark.parametrize(("optimizer", "steps", "batch_size"), [("sgd", 3, COUNT), ("sgd", 3, 6), ("adamw", 4, 6)])
def test_more_steps_select_the_largest_changes_of_a_dense_b(shared, optimizer, steps, batch_size):
    """AdamW changes many entries by nearly the same amount, so rounding may swap entries at the threshold."""
    task = make_task(steps, optimizer, batch_size)
    selected = calibrated(shared, task)
    change = reference_change(shared, task)
    for module, positions in selected.items():
        k = positions_per_matrix(0.8, shared[0].targets[module].out_features, shared[0].rank)
        expected = set(ranked(change[module], free(shared, module), k))
        border = min(abs(change[module][i].item()) for i in expected)
        assert len(set(positions.tolist())) == k
        for i in expected ^ set(positions.tolist()):
            assert abs(change[module][i].item()) == pytest.approx(border, rel=1e-4)
        assert len(expected ^ set(positions.tolist())) <= k // 20


def test_values_of_earlier_tasks_stay_fixed_and_active(shared):
    base, checkpoint = shared
    seen, losses = [], []

    def look(loss, step, total):
        losses.append(loss)
        for module in base.targets:
            layer = base.model.get_submodule(module)
            b = layer.b(layer.values.detach(), torch.float64)
            outside = torch.ones(b.numel(), dtype=torch.bool)
            outside[free(shared, module)] = False
            before = combined_b(checkpoint, module, checkpoint.manifest.all_tasks()).double().view(-1)
            assert torch.equal(b.view(-1)[outside], before[outside])
            assert not torch.equal(b.view(-1)[~outside], before[~outside])
        seen.append((step, total))

    selected = calibrated(shared, make_task(3, "adamw"), on_step=look)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for module, positions in selected.items():
        assert set(positions.tolist()) <= set(free(shared, module).tolist())
    merger = Merger(base.model, checkpoint)
    merger.merge(checkpoint.manifest.all_tasks())
    batch = toys.batch(toys.examples(4, COUNT))
    assert base.model(**batch).loss.item() == pytest.approx(losses[0], rel=1e-5)
    merger.merge(TaskSet())
    assert base.model(**batch).loss.item() != pytest.approx(losses[0], rel=1e-3)


def test_with_start_base_earlier_tasks_are_inactive_and_keep_their_positions(shared):
    task = make_task(1, "sgd")
    selected = calibrated(shared, task, on=())
    gradient = reference_change(shared, task, on=())
    for module, positions in selected.items():
        k = positions_per_matrix(0.8, shared[0].targets[module].out_features, shared[0].rank)
        assert positions.tolist() == ranked(gradient[module], free(shared, module), k)


def test_without_any_gradient_the_lowest_free_positions_are_selected(shared):
    base, checkpoint = shared
    silent = dataclasses.replace(base, projections={m: torch.zeros_like(a) for m, a in base.projections.items()})
    selected = calibrated((silent, checkpoint), make_task(2, "adamw"))
    for module, positions in selected.items():
        assert positions.tolist() == free(shared, module)[: len(positions)].tolist()
        assert len(positions) == positions_per_matrix(0.8, base.targets[module].out_features, base.rank)


def test_calibration_has_no_dropout_and_depends_on_the_seed_through_its_mini_batches(shared):
    base, checkpoint = shared
    plain = calibrated(shared, make_task(1, "sgd", 4))
    dropped = calibrated(shared, make_task(1, "sgd", 4, dropout=0.5))
    earlier = {module: earlier_tasks(checkpoint, ("one", "two"), module) for module in base.targets}
    data = toys.examples(4, COUNT)
    other = calibrate(base, make_task(1, "sgd", 4), data, toys.taken(checkpoint), earlier, SEED + 1)
    assert all(torch.equal(plain[m], dropped[m]) for m in plain)
    assert not all(torch.equal(plain[m], other[m]) for m in plain)


def test_learning_rate_and_batch_size_default_to_those_of_training(shared):
    losses = {}
    for name, calibration in {"own": {"learning_rate": 0.3, "batch_size": 4}, "left out": {}}.items():
        task = toys.task(
            "new",
            alpha=24.0,
            sparsity=0.8,
            calibration={"steps": 3, "optimizer": "sgd", "learning_rate": None, **calibration},
            training={"learning_rate": 0.3, "batch_size": 4},
        )
        losses[name] = []
        calibrated(shared, task, on_step=lambda loss, *_, name=name: losses[name].append(loss))
    assert losses["own"] == losses["left out"]


def test_a_learning_rate_that_makes_b_infinite_is_refused_with_the_modules_name(shared):
    calibration = {"steps": 1, "optimizer": "sgd", "learning_rate": 1e200}
    task = toys.task("new", alpha=1e200, sparsity=0.8, calibration=calibration)
    with pytest.raises(ConfigError, match="calibration of task 'new': B in .* is not finite"):
        calibrated(shared, task)
