"""Training of bfloat16 weights: through a float32 copy it follows float32, and without one it goes nowhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from loraf_train.trainer import arguments, loop
from loraf_train.trainer.master_weights import MasterAdamW
from tests.loraf_train import toys
from tests.standins import make_model

STEPS, RATE = 40, 1e-5  # the rate of the paper's full fine-tuning


def test_it_is_torchs_adamw_on_the_float32_copies():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 5), (11,), (3,))]
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    parameters = [nn.Parameter(t.to(dtype)) for t, dtype in zip(start, dtypes, strict=True)]
    copies = [nn.Parameter(p.detach().float()) for p in parameters]
    ours = MasterAdamW(parameters, lr=0.0, weight_decay=0.1)
    theirs = torch.optim.AdamW(copies, lr=0.0, weight_decay=0.1, fused=True)
    for step in range(5):
        for p, copy in zip(parameters, copies, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if step != 2 or p.dim() == 2 else None
            copy.grad = None if p.grad is None else p.grad.float()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)  # as a schedule does
            optimizer.step()
        for p, copy, dtype in zip(parameters, copies, dtypes, strict=True):
            assert p.dtype == dtype and torch.equal(p, copy.to(dtype))
            state = ours.state[p]
            assert torch.equal(state.get("master", p), copy)
            assert all(t.dtype == torch.float32 for t in state.values())
            assert all(torch.equal(state[key], theirs.state[copy][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert sum(t.nbytes for t in ours.state[parameters[0]].values()) == 12 * 35 + 4  # copy and moments, and the counter


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def trained(model_folder, dtype: torch.dtype, steps=STEPS, journal=loop.NO_JOURNAL) -> tuple[torch.Tensor, list[float]]:
    """The change of all weights, (weights,) float64, and the loss of every step."""
    model, losses = toys.load(model_folder, dtype).requires_grad_(True), []
    before = [p.detach().double() for p in model.parameters()]
    phase = toys.phase(seed=11, learning_rate=RATE, batch_size=8, max_steps=steps, dropout=0.0)
    loop.fit(model, toys.examples(1, 8), phase, toys.PAD, lambda loss, *_: losses.append(loss), journal)
    changes = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
    return torch.cat([change.view(-1) for change in changes]), losses


@pytest.fixture(scope="module")
def exact(model_folder):
    return trained(model_folder, torch.float32)


def agreement(change: torch.Tensor, expected: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(change, expected, dim=0))


def test_bfloat16_follows_float32(model_folder, exact):
    expected, expected_losses = exact
    change, losses = trained(model_folder, torch.bfloat16)
    assert expected_losses[0] - expected_losses[-1] > 0.8
    # Most weights are between 1/32 and 1/16, so 13 steps bring them past the middle of two bfloat16 numbers, or 25.
    assert losses[30:] == pytest.approx(expected_losses[30:], abs=0.1)
    assert losses[0] - losses[-1] == pytest.approx(expected_losses[0] - expected_losses[-1], rel=0.05)
    moved, expected_moved = (float((c != 0).double().mean()) for c in (change, expected))
    assert moved > 0.8 * expected_moved
    assert agreement(change, expected) > 0.9
    assert change.norm() == pytest.approx(expected.norm().item(), rel=0.1)


def test_without_float32_copies_it_does_not(model_folder, exact, monkeypatch):
    monkeypatch.setattr(arguments, "MasterAdamW", lambda p, lr, decay: torch.optim.AdamW(p, lr=lr, weight_decay=decay))
    expected, expected_losses = exact
    change, losses = trained(model_folder, torch.bfloat16)
    assert (change != 0).double().mean() < 0.05 and agreement(change, expected) < 0.3
    assert losses[-1] > expected_losses[-1] + 0.5


def test_a_phase_resumes_with_its_float32_copies(model_folder):
    class Stopping(loop.Journal):
        def after_step(self, step, steps, snapshot):
            if step == 4:
                saved = snapshot()  # which a ResumeStore writes at once
                self.saved = dataclasses.replace(saved, tensors={k: t.clone() for k, t in saved.tensors.items()})

    stopping, resuming = Stopping(), loop.Journal()
    whole, losses = trained(model_folder, torch.bfloat16, 8, stopping)
    resuming.start = stopping.saved
    change, later_losses = trained(model_folder, torch.bfloat16, 8, resuming)
    assert torch.equal(change, whole) and later_losses == losses[4:]
