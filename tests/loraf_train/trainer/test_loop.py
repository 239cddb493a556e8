"""The training loop: batches, loss and optimization against plain PyTorch, and that it leaves nothing behind."""

from __future__ import annotations

import os
from math import cos, pi

import accelerate
import pytest
import torch
from torch import nn

from loraf.errors import ConfigError
from loraf_train.adapter.host import attached, earlier
from loraf_train.data.examples import Example
from loraf_train.trainer import loop
from tests.loraf_train import toys
from tests.standins import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model_folder, tmp_path_factory):
    """A float64 model with an earlier task acting on it, and random masks for a new one."""
    host, checkpoint = toys.host(model_folder, tmp_path_factory.mktemp("ckpt"), old=(12.0, 0.75))
    before = {module: earlier(checkpoint, ["old"], module) for module in host.targets}
    masks = {}
    for module, b in checkpoint.tasks["old"].items():
        free = torch.ones(b.shape[0] * b.shape[1], dtype=torch.bool)
        free[b.flat] = False
        masks[module] = free.nonzero().view(-1)[::3]
    return host, before, masks


def test_batches_are_padded_right_and_only_completions_count():
    batch = loop.Collator(9)([Example([1, 5, 6, 2], 2), Example([4, 3], 0), Example([7, 8, 2], 3)])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [4, 3, 9, 9], [7, 8, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 3, -100, -100], [-100] * 4]


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed in (0, 1):
        order = loop.Order(50, seed)
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
    assert loop.split_batch(batch, micro, processes) == expected


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="training.batch_size: 30 examples cannot be divided over 8 processes"):
        loop.split_batch(30, None, 8)


def test_the_loss_is_the_models_own(model_folder):
    model = toys.load(model_folder)
    batch = toys.batch(toys.examples(1, 7))
    labels = batch.pop("labels")
    outputs = model(**batch)
    torch.testing.assert_close(loop.completion_loss(outputs, labels), model(**batch, labels=labels).loss)
    halved = loop.completion_loss(outputs, labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(2 * halved, loop.completion_loss(outputs, labels))


def phase(**changes) -> loop.Phase:
    fields = {"name": "toy", "learning_rate": 3e-2, "batch_size": 8, "seed": 11, "max_grad_norm": 1.0}
    return loop.Phase(**(fields | changes))


def fitted(shared, chosen: loop.Phase, count: int = 20, on_step=lambda *step: None):
    """Values of every module after `fit`, and what it says of itself."""
    host, before, masks = shared
    layers = host.layers(masks, 2.0, before)
    with attached(host.model, layers):
        outcome = loop.fit(host.model, toys.examples(1, count), chosen, host.pad_id, on_step)
    return {name: layer.values.detach() for name, layer in layers.items()}, outcome


def rate(kind: str, step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step counted from 0, as the schedules' names are commonly understood."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + cos(pi * done))}[kind]


def plain_pytorch(shared, chosen: loop.Phase, count: int, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training written out: dense B, masked gradients, whole batches, clipping, torch.optim by hand."""
    host, before, masks = shared
    dense = {}
    for name, base in host.targets.items():
        old = torch.zeros(base.out_features * host.rank, dtype=torch.float64)
        old[before[name].positions.long()] = before[name].values.double()
        dense[name] = toys.DenseLoraf(base, host.projections[name], 2.0, old.view(-1, host.rank))
        inside = torch.zeros(base.out_features * host.rank, dtype=torch.float64)
        inside[masks[name]] = 1.0
        inside = inside.view(-1, host.rank)
        dense[name].b.register_hook(lambda g, inside=inside: g * inside)
    parameters = [layer.b for layer in dense.values()]
    if chosen.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=1.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=chosen.weight_decay)
    examples = toys.examples(1, count)
    losses = []
    with attached(host.model, dense):
        order = loop.Order(count, chosen.seed)
        step = epoch = 0
        while step < steps:
            order.set_epoch(epoch)
            indices = list(order)
            for start in range(0, count, chosen.batch_size):
                if step == steps:
                    break
                batch = toys.batch([examples[i] for i in indices[start : start + chosen.batch_size]])
                loss = host.model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                norm = torch.stack([p.grad.norm() for p in parameters]).norm()
                if 0 < chosen.max_grad_norm < norm:
                    for p in parameters:
                        p.grad *= chosen.max_grad_norm / norm
                for group in optimizer.param_groups:
                    group["lr"] = chosen.learning_rate * rate(chosen.schedule, step, steps, chosen.warmup_steps)
                optimizer.step()
                losses.append(loss.item())
                step += 1
            epoch += 1
    return {name: layer.b.detach().view(-1)[masks[name]] for name, layer in dense.items()}, losses


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2.0},
        {"steps": 5, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.3},
        {"steps": 4, "schedule": "cosine", "max_grad_norm": 0.05},
        {"steps": 4, "micro_batch_size": 3},
        {"steps": 4, "micro_batch_size": 2, "gradient_checkpointing": True},
        {"steps": 4, "optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_training_is_that_of_plain_pytorch(shared, changes):
    """20 examples in batches of 8: the last step of each epoch has 4, so that tokens must be counted, not examples."""
    chosen = phase(**changes)
    seen = []
    found, outcome = fitted(shared, chosen, 20, lambda *step: seen.append(step))
    steps = chosen.steps or 6
    expected, losses = plain_pytorch(shared, chosen, 20, steps)
    for name, values in found.items():
        assert values.abs().max() > 1e-3
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5)
    assert [s[0] for s in seen] == pytest.approx(losses, rel=1e-5)
    rates = [chosen.learning_rate * rate(chosen.schedule, i, steps, chosen.warmup_steps) for i in range(steps)]
    assert [s[1] for s in seen] == pytest.approx(rates)
    assert [s[2:] for s in seen] == [(i + 1, steps) for i in range(steps)]
    assert outcome == loop.Outcome(steps, seen[0][0], seen[-1][0])


def test_it_leaves_nothing_behind(shared, capfd, tmp_path, monkeypatch):
    host = shared[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    environment, modules = dict(os.environ), dict(host.model.named_modules())
    host.model.config.use_cache = True
    weights = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    fitted(shared, phase(steps=2, gradient_checkpointing=True))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "tmp"] and list((tmp_path / "tmp").iterdir()) == []
    assert dict(os.environ) == environment
    assert host.model.config.use_cache is True and not host.model.training
    assert not host.model.is_gradient_checkpointing
    assert dict(host.model.named_modules()) == modules
    assert [type(m) for m in host.targets.values()] == [nn.Linear] * len(host.targets)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in host.model.state_dict().items())
    assert not host.model(**toys.batch(toys.examples(1, 2))).loss.requires_grad
    assert accelerate.state.AcceleratorState._shared_state == {}
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.state.GradientState._shared_state == {}
    accelerate.Accelerator(mixed_precision="bf16", cpu=True)  # would be refused if the loop's state were still there
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_a_loss_that_is_not_finite_stops_the_run_and_gives_the_model_back(shared):
    host = shared[0]
    with pytest.raises(ConfigError, match="toy: the loss is (nan|inf) at step [23]") as error:
        fitted(shared, phase(steps=6, optimizer="sgd", learning_rate=1e250, max_grad_norm=0.0))
    assert "learning rate below 1e+250" in str(error.value)
    assert [type(host.model.get_submodule(name)) for name in host.targets] == [nn.Linear] * len(host.targets)
    assert not host.model.training and accelerate.state.AcceleratorState._shared_state == {}


def test_no_examples_are_refused(shared):
    with pytest.raises(ConfigError, match="toy: there are no examples"):
        fitted(shared, phase(), count=0)


def test_dropout_is_a_function_of_the_seed(shared):
    host, before, masks = shared
    results = []
    for seed in (1, 1, 2):
        layers = host.layers(masks, 2.0, before, dropout=0.5)
        with attached(host.model, layers):
            loop.fit(host.model, toys.examples(1, 8), phase(steps=2, seed=seed), host.pad_id, lambda *step: None)
        results.append(torch.cat([layer.values.detach() for layer in layers.values()]))
        torch.rand(3)  # whatever happens between two runs
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
