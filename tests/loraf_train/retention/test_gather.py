"""Statistics of a model: against a dense, slow computation of the formulas, and against the measured change."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from loraf import base_model
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.data.examples import IGNORED, Example
from loraf_train.retention import gather as gathering
from loraf_train.retention.gather import gather
from loraf_train.retention.measured import completion_logits, root_mean_square_change
from loraf_train.retention.statistics import mean_square_change
from tests.loraf_train import toys
from tests.standins import make_model


@pytest.fixture(scope="module")
def base_and_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    make_model("llama", folder / "base")
    base, checkpoint = toys.trainable_base(folder / "base", folder / "ckpt", dtype=torch.float32, one=(16.0, 0.75))
    none = {module: torch.empty(0, dtype=torch.int64) for module in base.targets}
    layers = base.layers(none, 1.0, {module: earlier_tasks(checkpoint, ["one"], module) for module in base.targets})
    with attached(base.model, layers):
        yield base, layers


def dense(base, layers, examples, seed, rounds):
    """G and C of every module, by one backward pass of one example at a time, with autograd's own gradients."""
    g_sum = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}
    c_sum = {name: torch.zeros(layer.rank, layer.rank) for name, layer in layers.items()}
    energy = dict.fromkeys(layers, 0.0)
    tokens = 0
    for number, example in enumerate(examples):
        labels = torch.tensor([example.labels()])
        labelled = labels[:, 1:] != IGNORED
        for round_ in range(rounds):
            outputs, inputs = {}, {}

            def keep(module, given, output, outputs=outputs, inputs=inputs):
                name = next(name for name, layer in layers.items() if layer is module)
                outputs[name], inputs[name] = output, given[0]

            handles = [layer.register_forward_hook(keep) for layer in layers.values()]
            embedded = base.model.get_input_embeddings()(torch.tensor([example.input_ids])).detach().requires_grad_()
            logits = base.model(inputs_embeds=embedded).logits[:, :-1][labelled]
            for handle in handles:
                handle.remove()
            seed_of_example = gathering.derived_seed(seed, "probe", number, round_)
            probes = gathering._probes(len(logits), logits.shape[-1], seed_of_example, logits.device)
            centred = logits - logits.mean(-1, keepdim=True)
            gradients = torch.autograd.grad((centred * probes).sum(), list(outputs.values()))
            for name, g in zip(outputs, gradients, strict=True):
                g, z = g[0], inputs[name][0] @ layers[name].a.t()
                g_sum[name] += g.t() @ g
                c_sum[name] += torch.einsum("ti,tj,t->ij", z, z, g.square().sum(1))
                energy[name] += float(g.square().sum())
            tokens += len(logits)
    return {name: g / tokens for name, g in g_sum.items()}, {name: c / energy[name] for name, c in c_sum.items()}


def test_g_and_c_are_those_of_the_formulas(base_and_layers):
    base, layers = base_and_layers
    examples = toys.examples(7, 6)
    found = gather(base.model, layers, examples, toys.PAD, seed=3, rounds=2)
    g, c = dense(base, layers, examples, 3, 2)
    for name, of_module in found.items():
        torch.testing.assert_close(
            of_module.factor @ of_module.factor.t(), c[name], rtol=1e-3, atol=1e-5 * float(c[name].max())
        )
        u = of_module.directions.double()
        best = torch.linalg.eigvalsh(g[name].double())[-u.shape[1] :].sum()
        beyond = torch.linalg.eigvalsh(g[name].double() - u @ u.t())[0]
        assert u.square().sum() > 0.85 * best  # of a spectrum as flat as an untrained model's
        assert beyond > -1e-3 * best  # nothing is made up
        diagonal = u.square().sum(1).float() + of_module.rest
        torch.testing.assert_close(diagonal, g[name].diagonal(), rtol=1e-3, atol=1e-6 * float(g[name].max()))


def test_statistics_do_not_depend_on_how_examples_are_batched(base_and_layers):
    base, layers = base_and_layers
    examples = toys.examples(7, 12)
    whole, in_parts = (
        gather(base.model, layers, examples, toys.PAD, seed=3, tokens_at_once=tokens) for tokens in (10_000, 1)
    )
    delta = {name: torch.randn(layer.out_features, layer.rank) for name, layer in layers.items()}
    assert mean_square_change(whole, delta) == pytest.approx(mean_square_change(in_parts, delta), rel=1e-4)


def test_the_model_is_left_as_it_was(base_and_layers):
    base, layers = base_and_layers
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    modes = {name: p.requires_grad for name, p in base.model.named_parameters()}
    gather(base.model, layers, toys.examples(7, 4), toys.PAD, seed=0)
    assert {name: p.requires_grad for name, p in base.model.named_parameters()} == modes
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.model.named_parameters())
    assert not base.model.training and not base.model.get_input_embeddings()._forward_hooks


def test_a_layer_that_the_model_calls_without_gradients_has_no_statistics(base_and_layers, monkeypatch):
    """As the indexers of DeepSeek V3.2 and GLM's models with its attention."""
    base, layers = base_and_layers
    name = "model.layers.1.self_attn.q_proj"
    usual = gather(base.model, layers, toys.examples(7, 4), toys.PAD, seed=3)
    monkeypatch.setattr(layers[name], "forward", torch.no_grad()(layers[name].forward))
    found = gather(base.model, layers, toys.examples(7, 4), toys.PAD, seed=3)
    assert not any(part.any() for part in (found[name].directions, found[name].rest, found[name].factor))
    other = "model.layers.1.self_attn.v_proj"
    torch.testing.assert_close(found[other].factor, usual[other].factor)


def test_a_model_may_change_its_embedded_text_in_place(base_and_layers, monkeypatch):
    """As CTRL does."""
    base, layers = base_and_layers
    norm = base.model.model.layers[0].input_layernorm
    usual = norm.forward
    expected = gather(base.model, layers, toys.examples(7, 4), toys.PAD, seed=3)
    monkeypatch.setattr(norm, "forward", lambda embedded: usual(embedded.mul_(1.0)))
    found = gather(base.model, layers, toys.examples(7, 4), toys.PAD, seed=3)
    for name in found:
        torch.testing.assert_close(found[name].factor, expected[name].factor)


@pytest.mark.parametrize(
    ("module", "within"),
    [("self_attn.q_proj", 0.2), ("mlp.down_proj", 0.2), ("self_attn.v_proj", 0.6)],  # its tokens are not independent
)
@pytest.mark.parametrize("layer", [0, 3])
def test_the_predicted_change_of_logits_is_the_measured_one(tiny, layer, module, within):
    """For small random changes of one module of a trained model, the mean of several."""
    base, layers, examples = tiny
    name = f"model.layers.{layer}.{module}"
    statistics = gather(base.model, layers, examples, base.pad_id, seed=1)
    changed = layers[name]
    before = completion_logits(base.model, examples, base.pad_id)
    predicted = measured = 0.0
    for seed in range(6):
        shape = (changed.out_features, changed.rank)
        d = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
        changed.earlier_positions = torch.arange(d.numel(), dtype=torch.int32)
        changed.earlier_values = d.reshape(-1)
        measured += root_mean_square_change(before, completion_logits(base.model, examples, base.pad_id)) ** 2
        changed.earlier_values = torch.zeros(d.numel())
        predicted += mean_square_change({name: statistics[name]}, {name: d})
    assert predicted == pytest.approx(measured, rel=within)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded model without a task, and sums that it was trained on."""
    folder = base_model.resolve("tiny", None, "")
    base, _ = toys.trainable_base(folder, tmp_path_factory.mktemp("tiny") / "ckpt", rank=64, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for word in ("abc", "hello", "kitten", "garden", "python", "window", "tea", "orange"):
        prompt = tokenizer(f"Reverse: {word}\n").input_ids
        answer = tokenizer(word[::-1], add_special_tokens=False).input_ids
        examples.append(Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    none = {module: torch.empty(0, dtype=torch.int64) for module in base.targets}
    layers = base.layers(none, 1.0, dict.fromkeys(base.targets, EarlierTasks.of(())))
    with attached(base.model, layers):
        yield base, layers, examples


def test_statistics_without_any_gradient_are_refused(base_and_layers, monkeypatch):
    """They would protect nothing, and nobody would notice."""
    base, layers = base_and_layers
    monkeypatch.setattr(gathering, "_probes", lambda tokens, vocabulary, *_: torch.zeros(tokens, vocabulary))
    with pytest.raises(FloatingPointError, match="nothing would be protected"):
        gather(base.model, layers, toys.examples(7, 2), toys.PAD, seed=3)
