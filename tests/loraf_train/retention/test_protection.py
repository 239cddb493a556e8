"""The penalty while a task trains: its gradient against autograd, its strength, its state."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from loraf.errors import ConfigError
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.retention.protection import PRICE, ProtectedTask, Protection, allowed
from loraf_train.retention.statistics import ModuleStatistics

D_OUT, D_IN, RANK = 10, 6, 4
MODULES = ("a", "b")
SCALE = 0.7


def layers(seed: int = 0) -> dict[str, LorafLinear]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in MODULES:
        positions = torch.randperm(D_OUT * RANK, generator=generator)[:15].sort().values
        a = torch.randn(RANK, D_IN, generator=generator)
        values = torch.randn(15, generator=generator) * 0.1
        made[name] = LorafLinear(nn.Linear(D_IN, D_OUT), a, positions, SCALE, values=values)
        made[name].values.grad = torch.zeros(15)
    return made


def protected(name: str, seed: int, later: bool) -> ProtectedTask:
    generator = torch.Generator().manual_seed(seed)

    def statistics() -> ModuleStatistics:
        return ModuleStatistics(
            torch.randn(D_OUT, 3, generator=generator),
            torch.rand(D_OUT, generator=generator),
            torch.randn(RANK, RANK, generator=generator).tril(),
        )

    def stored() -> EarlierTasks:
        count = 12 if later else 0
        positions = torch.randperm(D_OUT * RANK, generator=generator)[:count].sort().values
        return EarlierTasks(positions.to(torch.int32), torch.randn(count, generator=generator) * 0.1)

    return ProtectedTask(name, {m: statistics() for m in MODULES}, {m: stored() for m in MODULES})


def by_autograd(of: dict[str, LorafLinear], task: ProtectedTask) -> tuple[float, dict[str, torch.Tensor]]:
    """P of the written formula in float64, tr(G·D·C·Dᵀ) over the modules, and its gradient by the values."""
    values = {name: layer.values.detach().double().requires_grad_() for name, layer in of.items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in of.items():
        s, later = task.statistics[name], task.later[name]
        d = torch.zeros(D_OUT * RANK, dtype=torch.float64)
        d = d.index_add(0, later.positions.long(), later.values.double())
        d = d.index_add(0, layer.positions.long(), values[name] * SCALE).view(D_OUT, RANK)
        g = (s.directions @ s.directions.t() + s.rest.diag()).double()
        c = (s.factor @ s.factor.t()).double()
        total = total + torch.trace(g @ d @ c @ d.t())
    return float(total), dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True))


def test_the_gradient_is_that_of_the_formula():
    of = layers()
    tasks = [protected("one", 1, later=True), protected("two", 2, later=False)]
    protection = Protection(of, tasks, budget=0.2)
    protection.add_gradient(0, 100)
    strengths = protection.state()["log_strength"].exp().tolist()
    expected = {name: torch.zeros(15, dtype=torch.float64) for name in of}
    for strength, task in zip(strengths, tasks, strict=True):
        change, gradients = by_autograd(of, task)
        assert protection.changes()[task.name] == pytest.approx(change**0.5, rel=1e-5)
        for name, gradient in gradients.items():
            expected[name] += strength * gradient
    for name, layer in of.items():
        torch.testing.assert_close(layer.values.grad, expected[name].float(), rtol=1e-4, atol=1e-6)


def test_it_is_added_to_the_gradient_of_the_loss():
    of, again = layers(), layers()
    for layer in again.values():
        layer.values.grad += 1.0
    for each in (of, again):
        Protection(each, [protected("one", 1, later=True)], budget=0.2).add_gradient(0, 100)
    for name in of:
        torch.testing.assert_close(again[name].values.grad, of[name].values.grad + 1.0)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_it_is_steered_into_the_budget(scale):
    """A loss of another scale needs another strength; where training ends, the budget is kept."""
    of = layers()
    target = {name: torch.randn_like(layer.values) for name, layer in of.items()}
    protection = Protection(of, [protected("one", 1, later=False)], budget=0.3)
    optimizer = torch.optim.Adam([layer.values for layer in of.values()], lr=0.02)
    steps = 600
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + math.cos(math.pi * step / steps)) / 2
        for name, layer in of.items():
            layer.values.grad = scale * (layer.values.detach() - target[name])
        protection.add_gradient(step, steps)
        optimizer.step()
    assert 0.2 < protection.changes()["one"] < 1.1 * 0.3
    assert PRICE < protection.state()["log_strength"].exp() < 100


def test_within_the_budget_a_change_has_its_price_all_the_same():
    of = layers()
    protection = Protection(of, [protected("one", 1, later=False)], budget=1e3)
    for step in range(10):
        protection.add_gradient(step, 10)
        assert protection.state()["log_strength"].exp() == pytest.approx(PRICE * min(1.0, (step + 1) / 7))


def test_more_is_allowed_at_first():
    allowances = [allowed(0.2, step, 100) for step in range(1, 101)]
    assert allowances == sorted(allowances, reverse=True)
    assert allowances[0] > 10 * 0.2**2
    assert allowances[69:] == pytest.approx([0.2**2] * 31)


@pytest.mark.parametrize("budget", [1e-200, 1e200])
def test_a_budget_whose_square_is_no_number_is_like_a_very_small_or_large_one(budget):
    of = layers()
    protection = Protection(of, [protected("one", 1, later=False)], budget)
    for step in range(10):
        protection.add_gradient(step, 10)
    assert protection.state()["log_strength"].exp() == pytest.approx(100 if budget < 1 else PRICE)
    assert all(layer.values.grad.isfinite().all() for layer in of.values())


def test_its_state_is_all_that_the_next_step_depends_on():
    of, again = layers(), layers()
    task = protected("one", 1, later=True)
    first = Protection(of, [task], budget=0.2)
    for step in range(5):
        first.add_gradient(step, 100)
    second = Protection(again, [task], budget=0.2)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for each, protection in ((of, first), (again, second)):
        for layer in each.values():
            layer.values.grad = torch.zeros(15)
        protection.add_gradient(5, 100)
    for name in of:
        assert torch.equal(of[name].values.grad, again[name].values.grad)


def test_a_change_that_is_not_finite_is_named_before_it_spoils_the_values():
    task = protected("one", 1, later=True)
    huge = {m: ModuleStatistics(s.directions, s.rest + 3e38, s.factor * 1e3) for m, s in task.statistics.items()}
    of = layers()
    protection = Protection(of, [protected("two", 2, later=False), dataclasses.replace(task, statistics=huge)], 0.2)
    with pytest.raises(ConfigError, match="change of the logits of one is not finite at step 4 .*protect --again"):
        protection.add_gradient(3, 100)
    assert all(torch.equal(layer.values.grad, torch.zeros(15)) for layer in of.values())
