"""The training loop: batches, loss and optimization against plain PyTorch; and it restores all global state."""

from __future__ import annotations

import os
from math import cos, pi

import accelerate
import pytest
import torch
from torch import nn

from loraf.errors import ConfigError
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.data.examples import Example
from loraf_train.trainer import batches, loop
from loraf_train.trainer.order import EpochOrder, split_batch
from tests.loraf_train import toys
from tests.standins import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model_folder, tmp_path_factory):
    """A float64 model with an active earlier task, and positions for a new one."""
    base, checkpoint = toys.trainable_base(model_folder, tmp_path_factory.mktemp("ckpt"), old=(12.0, 0.75))
    earlier = {module: earlier_tasks(checkpoint, ["old"], module) for module in base.targets}
    positions = {}
    for module, b in checkpoint.tasks["old"].items():
        free = torch.ones(b.shape[0] * b.shape[1], dtype=torch.bool)
        free[b.positions] = False
        positions[module] = free.nonzero().view(-1)[::3]
    return base, earlier, positions


def test_batches_are_padded_on_the_right_and_only_completions_have_labels():
    batch = batches.Collator(9)([Example([1, 5, 6, 2], 2), Example([4, 3], 0), Example([7, 8, 2], 3)])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [4, 3, 9, 9], [7, 8, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 3, -100, -100], [-100] * 4]


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed in (0, 1):
        order = EpochOrder(50, seed)
        for epoch in (0, 1):
            order.set_epoch(epoch)
            torch.manual_seed(epoch)
            orders[seed, epoch] = list(order)
            assert sorted(orders[seed, epoch]) == list(range(50)) and list(order) == orders[seed, epoch]
    assert len({tuple(o) for o in orders.values()}) == 4


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (32, None, 1, (32, 1)),
        (32, 4, 1, (4, 8)),
        (32, 4, 8, (4, 1)),
        (30, 4, 1, (3, 10)),
        (8, 64, 2, (4, 1)),
        (7, 2, 1, (1, 7)),
    ],
)
def test_a_batch_is_split_over_processes_and_accumulation(batch, micro, processes, expected):
    assert split_batch(batch, micro, processes) == expected


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="training.batch_size: 30 examples cannot be divided over 8 processes"):
        split_batch(30, None, 8)


def test_the_loss_equals_the_models_own(model_folder):
    model = toys.load(model_folder)
    batch = toys.batch(toys.examples(1, 7))
    labels = batch.pop("labels")
    outputs = model(**batch)
    torch.testing.assert_close(loop.completion_loss(outputs, labels), model(**batch, labels=labels).loss)
    halved = loop.completion_loss(outputs, labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(2 * halved, loop.completion_loss(outputs, labels))


def make_phase(**changes) -> loop.Phase:
    return toys.phase(**{"learning_rate": 3e-2, "batch_size": 8, "seed": 11} | changes)


def fitted(shared, phase: loop.Phase, count: int = 20, on_step=lambda *step: None):
    """Values of every module after `fit`, and its outcome."""
    base, earlier, positions = shared
    layers = base.layers(positions, 2.0, earlier)
    with attached(base.model, layers):
        outcome = loop.fit(base.model, toys.examples(1, count), phase, base.pad_id, on_step)
    return {name: layer.values.detach() for name, layer in layers.items()}, outcome


def rate(kind: str, step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step counted from 0, by the usual definition of the schedules."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + cos(pi * done))}[kind]


def plain_pytorch(shared, phase: loop.Phase, count: int, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training written out: dense B, masked gradients, whole batches, clipping, torch.optim."""
    base, earlier, positions = shared
    dense = {}
    for name, linear in base.targets.items():
        old = torch.zeros(linear.out_features * base.rank, dtype=torch.float64)
        old[earlier[name].positions.long()] = earlier[name].values.double()
        dense[name] = toys.DenseLoraf(linear, base.projections[name], 2.0, old.view(-1, base.rank))
        trainable = torch.zeros(linear.out_features * base.rank, dtype=torch.float64)
        trainable[positions[name]] = 1.0
        trainable = trainable.view(-1, base.rank)
        dense[name].b.register_hook(lambda g, trainable=trainable: g * trainable)
    parameters = [layer.b for layer in dense.values()]
    if phase.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=1.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=phase.settings.weight_decay)
    examples = toys.examples(1, count)
    losses = []
    with attached(base.model, dense):
        order = EpochOrder(count, phase.seed)
        step = epoch = 0
        while step < steps:
            order.set_epoch(epoch)
            indices = list(order)
            for start in range(0, count, phase.settings.batch_size):
                if step == steps:
                    break
                batch = toys.batch([examples[i] for i in indices[start : start + phase.settings.batch_size]])
                loss = base.model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                norm = torch.stack([p.grad.norm() for p in parameters]).norm()
                if 0 < phase.settings.max_grad_norm < norm:
                    for p in parameters:
                        p.grad *= phase.settings.max_grad_norm / norm
                for group in optimizer.param_groups:
                    group["lr"] = phase.settings.learning_rate * rate(
                        phase.settings.schedule, step, steps, phase.settings.warmup_steps
                    )
                optimizer.step()
                losses.append(loss.item())
                step += 1
            epoch += 1
    return {name: layer.b.detach().view(-1)[positions[name]] for name, layer in dense.items()}, losses


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2.0},
        {"max_steps": 5, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.3},
        {"max_steps": 4, "schedule": "cosine", "max_grad_norm": 0.05},
        {"max_steps": 4, "micro_batch_size": 3},
        {"max_steps": 4, "micro_batch_size": 2, "gradient_checkpointing": True},
        {"max_steps": 4, "optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_training_equals_plain_pytorch(shared, changes):
    """20 examples in batches of 8: the last step of each epoch has 4, so that tokens must be counted, not examples."""
    phase = make_phase(**changes)
    seen = []
    trained, outcome = fitted(shared, phase, 20, lambda *step: seen.append(step))
    steps = phase.settings.max_steps or 6
    expected, losses = plain_pytorch(shared, phase, 20, steps)
    for name, values in trained.items():
        assert values.abs().max() > 1e-3
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5)
    assert [s[0] for s in seen] == pytest.approx(losses, rel=1e-5)
    rates = [
        phase.settings.learning_rate * rate(phase.settings.schedule, i, steps, phase.settings.warmup_steps)
        for i in range(steps)
    ]
    assert [s[1] for s in seen] == pytest.approx(rates)
    assert [s[2:] for s in seen] == [(i + 1, steps) for i in range(steps)]
    assert outcome == loop.Outcome(steps, seen[0][0], seen[-1][0])


def test_fit_restores_model_environment_and_global_state(shared, capfd, tmp_path, monkeypatch):
    base = shared[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    environment, modules = dict(os.environ), dict(base.model.named_modules())
    base.model.config.use_cache = True
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    fitted(shared, make_phase(max_steps=2, gradient_checkpointing=True))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "tmp"] and list((tmp_path / "tmp").iterdir()) == []
    assert dict(os.environ) == environment
    assert base.model.config.use_cache is True and not base.model.training
    assert not base.model.is_gradient_checkpointing
    assert dict(base.model.named_modules()) == modules
    assert [type(m) for m in base.targets.values()] == [nn.Linear] * len(base.targets)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert not base.model(**toys.batch(toys.examples(1, 2))).loss.requires_grad
    assert accelerate.state.AcceleratorState._shared_state == {}
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.state.GradientState._shared_state == {}
    accelerate.Accelerator(mixed_precision="bf16", cpu=True)  # would be refused if the loop left its state behind
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_a_loss_that_is_not_finite_stops_the_run_and_restores_the_model(shared):
    base = shared[0]
    with pytest.raises(ConfigError, match="toy: the loss is (nan|inf) at step [23]") as error:
        fitted(shared, make_phase(max_steps=6, optimizer="sgd", learning_rate=1e250, max_grad_norm=0.0))
    assert "learning rate below 1e+250" in str(error.value)
    assert [type(base.model.get_submodule(name)) for name in base.targets] == [nn.Linear] * len(base.targets)
    assert not base.model.training and accelerate.state.AcceleratorState._shared_state == {}


def test_no_examples_are_refused(shared):
    with pytest.raises(ConfigError, match="toy: there are no examples"):
        fitted(shared, make_phase(), count=0)


def test_dropout_depends_on_the_seed_alone(shared):
    base, earlier, positions = shared
    results = []
    for seed in (1, 1, 2):
        layers = base.layers(positions, 2.0, earlier, dropout=0.5)
        with attached(base.model, layers):
            loop.fit(
                base.model, toys.examples(1, 8), make_phase(max_steps=2, seed=seed), base.pad_id, lambda *step: None
            )
        results.append(torch.cat([layer.values.detach() for layer in layers.values()]))
        torch.rand(3)  # whatever happens between two runs
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
