"""Methods of a comparison on models with a tied head or with experts: what is measured is what was trained."""

from __future__ import annotations

import pytest
import torch

from loraf_train.adapter.trainable_base import find_targets
from loraf_train.compare import methods
from loraf_train.sequence import runner
from tests.loraf_train import exported, toys


class Witness(methods.Listener):
    """Compares the model with the layers that were trained in it, and the model in which they are merged."""

    def __init__(self, model):
        self.model = model
        self.embedding = model.get_input_embeddings().weight
        self.values = self.embedding.detach().clone()
        self.adapted: set[str] = set()
        self.errors: list[float] = []
        self.effects: list[float] = []

    def ended(self, task):
        self.adapted = {name for name, module in self.model.named_modules() if hasattr(module, "lora_A")}
        self.trained_logits = exported.logits(self.model)

    def trained(self, task, outcome):
        scale = self.trained_logits.abs().max()
        self.errors.append(((exported.logits(self.model) - self.trained_logits).abs().max() / scale).item())
        head = self.model.get_output_embeddings().weight
        self.effects.append((head - self.values).abs().max().item())
        assert self.model.get_input_embeddings().weight is self.embedding
        assert torch.equal(self.embedding, self.values)


def train(name: str, base, folder, targets: list[str]) -> tuple[Witness, dict]:
    training = {"learning_rate": 1e-2, "max_steps": 3, "dropout": 0}
    tasks = [toys.task("one", alpha=6.0, training=training), toys.task("two", alpha=11.0, training=training)]
    adapter = {"dtype": "float32", "target_modules": targets}
    config = toys.run_config(base, folder / "ckpt", *tasks, seed=7, adapter=adapter)
    loaded = runner.load_model(config)
    witness = Witness(loaded[0])
    bench = methods.Bench(loaded, {"one": toys.data(3), "two": toys.data(50)}, folder / "scratch")
    methods.ALL[name].train(bench, config, witness)
    return witness, find_targets(loaded[0], targets)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return exported.build("llama", tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.mark.parametrize("name", ["loraf", "frozen-a", "lora", "ewc"])
def test_a_tied_head_is_adapted_alone(name, tied, tmp_path):
    witness, _ = train(name, tied, tmp_path, ["q_proj", "lm_head"])
    assert len(witness.errors) == 2 and max(witness.errors) <= 1e-4, witness.errors
    assert min(witness.effects) > 1e-3
    model = witness.model
    assert model.lm_head.weight is model.model.embed_tokens.weight is witness.embedding
    assert torch.equal(witness.embedding, witness.values) and model.config.tie_word_embeddings is True


def test_lora_adapts_the_same_layers_in_a_model_with_experts(tmp_path):
    base = exported.build("glm4_moe", tmp_path / "base")
    witness, targets = train("lora", base, tmp_path, ["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert witness.adapted == set(targets)
    assert max(witness.errors) <= 1e-4
