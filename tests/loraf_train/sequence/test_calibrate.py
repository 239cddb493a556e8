"""Calibration through a whole small model, against a dense B that plain autograd differentiates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraf.delta import Merger, combined_b, task_scale
from loraf.errors import ConfigError
from loraf.manifest import positions
from loraf.tasksets import TaskSet
from loraf_train.adapter.host import attached, earlier
from loraf_train.sequence.calibrate import calibrate
from loraf_train.trainer import loop
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
    return toys.host(model_folder, tmp_path_factory.mktemp("ckpt"), one=(12.0, 0.75), two=(20.0, 0.75))


def task(steps: int, optimizer: str, batch_size: int = COUNT, **training):
    calibration = {"steps": steps, "optimizer": optimizer, "batch_size": batch_size}
    return toys.task("new", alpha=24.0, sparsity=0.8, calibration=calibration, training=training)


def calibrated(shared, chosen, on=("one", "two"), **hooks):
    host, checkpoint = shared
    before = {module: earlier(checkpoint, on, module) for module in host.targets}
    return calibrate(host, chosen, toys.examples(4, COUNT), toys.taken(checkpoint), before, SEED, **hooks)


def slow_change(shared, chosen, on=("one", "two")) -> dict[str, torch.Tensor]:
    """B − B⁰ of every module as Algorithm 1 writes it: dense B, gradients times Ω, whole batches, torch.optim."""
    host, checkpoint = shared
    everything = TaskSet(tuple((name, 1.0) for name in on))
    dense, feasible = {}, {}
    for module, base in host.targets.items():
        b0 = combined_b(checkpoint, module, everything).double()
        dense[module] = toys.DenseLoraf(base, host.projections[module], task_scale(24.0, host.rank), b0)
        omega = torch.ones(base.out_features, host.rank, dtype=torch.float64)
        for values in checkpoint.tasks.values():
            omega.view(-1)[values[module].flat] = 0
        feasible[module] = omega
    parameters = [layer.b for layer in dense.values()]
    calibration = chosen.calibration
    if calibration.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=calibration.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=calibration.learning_rate, weight_decay=0.0)
    examples = toys.examples(4, COUNT)
    order = loop.Order(COUNT, SEED)
    indices: list[int] = []
    with attached(host.model, dense):
        for step in range(calibration.steps):
            if not indices:
                order.set_epoch(step * calibration.batch_size // COUNT)
                indices = list(order)
            drawn, indices = indices[: calibration.batch_size], indices[calibration.batch_size :]
            optimizer.zero_grad()
            host.model(**toys.batch([examples[i] for i in drawn])).loss.backward()
            for module, layer in dense.items():
                layer.b.grad *= feasible[module]
            optimizer.step()
    return {module: layer.b.detach().view(-1) for module, layer in dense.items()}


def ranked(change: torch.Tensor, allowed: torch.Tensor, k: int) -> list[int]:
    order = sorted(allowed.tolist(), key=lambda i: (-abs(change[i].item()), i))
    return sorted(order[:k])


def free(shared, module: str) -> torch.Tensor:
    host, checkpoint = shared
    owned = torch.cat([b[module].flat for b in checkpoint.tasks.values()])
    everything = torch.arange(host.targets[module].out_features * host.rank)
    return everything[~torch.isin(everything, owned)]


@pytest.mark.parametrize("training", [{}, {"micro_batch_size": 5}, {"gradient_checkpointing": True}])
def test_one_gradient_step_gives_the_top_k_of_the_gradient_on_free_positions(shared, training):
    chosen = task(1, "sgd", **training)
    found = calibrated(shared, chosen)
    gradient = slow_change(shared, chosen)  # −learning rate · ∇B ⊙ Ω
    for module, flat in found.items():
        k = positions(0.8, shared[0].targets[module].out_features, shared[0].rank)
        assert flat.dtype == torch.int64
        assert flat.tolist() == ranked(gradient[module], free(shared, module), k)


@pytest.mark.parametrize(("optimizer", "steps", "batch_size"), [("sgd", 3, COUNT), ("sgd", 3, 6), ("adamw", 4, 6)])
def test_more_steps_give_the_top_k_of_what_training_dense_moves(shared, optimizer, steps, batch_size):
    """AdamW moves many entries by nearly the same amount, so entries at the border may trade places by rounding."""
    chosen = task(steps, optimizer, batch_size)
    found = calibrated(shared, chosen)
    change = slow_change(shared, chosen)
    for module, flat in found.items():
        k = positions(0.8, shared[0].targets[module].out_features, shared[0].rank)
        expected = set(ranked(change[module], free(shared, module), k))
        border = min(abs(change[module][i].item()) for i in expected)
        assert len(set(flat.tolist())) == k
        for i in expected ^ set(flat.tolist()):
            assert abs(change[module][i].item()) == pytest.approx(border, rel=1e-4)
        assert len(expected ^ set(flat.tolist())) <= k // 20


def test_positions_of_earlier_tasks_never_move_and_act_all_the_time(shared):
    host, checkpoint = shared
    seen, losses = [], []

    def look(loss, step, total):
        losses.append(loss)
        for module in host.targets:
            layer = host.model.get_submodule(module)
            b = layer.b(layer.values.detach(), torch.float64)
            outside = torch.ones(b.numel(), dtype=torch.bool)
            outside[free(shared, module)] = False
            before = combined_b(checkpoint, module, checkpoint.manifest.all_tasks()).double().view(-1)
            assert torch.equal(b.view(-1)[outside], before[outside])
            assert not torch.equal(b.view(-1)[~outside], before[~outside])
        seen.append((step, total))

    found = calibrated(shared, task(3, "adamw"), on_step=look)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for module, flat in found.items():
        assert set(flat.tolist()) <= set(free(shared, module).tolist())
    merger = Merger(host.model, checkpoint)
    merger.merge(checkpoint.manifest.all_tasks())
    batch = toys.batch(toys.examples(4, COUNT))
    assert host.model(**batch).loss.item() == pytest.approx(losses[0], rel=1e-5)
    merger.merge(TaskSet())
    assert host.model(**batch).loss.item() != pytest.approx(losses[0], rel=1e-3)


def test_from_base_earlier_tasks_do_not_act_and_their_positions_stay_taken(shared):
    chosen = task(1, "sgd")
    found = calibrated(shared, chosen, on=())
    gradient = slow_change(shared, chosen, on=())
    for module, flat in found.items():
        k = positions(0.8, shared[0].targets[module].out_features, shared[0].rank)
        assert flat.tolist() == ranked(gradient[module], free(shared, module), k)


def test_without_any_gradient_the_lowest_free_positions_are_taken(shared):
    host, checkpoint = shared
    silent = dataclasses.replace(host, projections={m: torch.zeros_like(a) for m, a in host.projections.items()})
    found = calibrated((silent, checkpoint), task(2, "adamw"))
    for module, flat in found.items():
        assert flat.tolist() == free(shared, module)[: len(flat)].tolist()
        assert len(flat) == positions(0.8, host.targets[module].out_features, host.rank)


def test_calibration_has_no_dropout_and_depends_on_the_seed_through_its_mini_batches(shared):
    host, checkpoint = shared
    plain = calibrated(shared, task(1, "sgd", 4))
    dropped = calibrated(shared, task(1, "sgd", 4, dropout=0.5))
    before = {module: earlier(checkpoint, ("one", "two"), module) for module in host.targets}
    data = toys.examples(4, COUNT)
    other = calibrate(host, task(1, "sgd", 4), data, toys.taken(checkpoint), before, SEED + 1)
    assert all(torch.equal(plain[m], dropped[m]) for m in plain)
    assert not all(torch.equal(plain[m], other[m]) for m in plain)


def test_the_learning_rate_and_batch_are_the_trainings_where_calibration_has_none(shared):
    losses = {}
    for name, calibration in {"own": {"learning_rate": 0.3, "batch_size": 4}, "left out": {}}.items():
        chosen = toys.task(
            "new",
            alpha=24.0,
            sparsity=0.8,
            calibration={"steps": 3, "optimizer": "sgd", "learning_rate": None, **calibration},
            training={"learning_rate": 0.3, "batch_size": 4},
        )
        losses[name] = []
        calibrated(shared, chosen, on_step=lambda loss, *_, name=name: losses[name].append(loss))
    assert losses["own"] == losses["left out"]


def test_a_rate_that_destroys_b_is_refused_by_name(shared):
    calibration = {"steps": 1, "optimizer": "sgd", "learning_rate": 1e200}
    chosen = toys.task("new", alpha=1e200, sparsity=0.8, calibration=calibration)
    with pytest.raises(ConfigError, match="calibration of task 'new': B in .* is not finite"):
        calibrated(shared, chosen)
