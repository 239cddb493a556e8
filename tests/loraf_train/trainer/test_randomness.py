"""What a step draws does not depend on how its batch is cut: the adapter's dropout, and the base model's own."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from loraf_train.adapter.dropout import ModuleDraws
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.trainer import loop
from loraf_train.trainer.batches import EXAMPLES, PLACES, Collator, NumberedCollator
from loraf_train.trainer.packing import PackingCollator
from loraf_train.trainer.randomness import drawn_by_token, own_randomness
from tests.loraf_train import toys
from tests.standins import make_model

ROW = 40


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A float32 model with an active earlier task, and positions for a new one."""
    folder = make_model("llama", tmp_path_factory.mktemp("model"))
    base, checkpoint = toys.trainable_base(
        folder, tmp_path_factory.mktemp("ckpt"), dtype=torch.float32, old=(12.0, 0.75)
    )
    earlier = {module: earlier_tasks(checkpoint, ["old"], module) for module in base.targets}
    return base, earlier, {m: torch.arange(0, linear.out_features * 8, 3) for m, linear in base.targets.items()}


def fitted(shared, dropout: float, journal=loop.NO_JOURNAL, **changes) -> torch.Tensor:
    """Values of all modules after four steps of 8 of 20 examples."""
    base, earlier, positions = shared
    layers = base.layers(positions, 2.0, earlier, dropout)
    with attached(base.model, layers):
        phase = toys.phase(seed=11, learning_rate=2e-2, batch_size=8, max_steps=4, **changes)
        loop.fit(base.model, toys.examples(1, 20), phase, base.pad_id, lambda *_: None, journal)
    assert all(layer.draws is None for layer in layers.values())
    return torch.cat([layer.values.detach() for layer in layers.values()])


class BeforeByToken(loop.Journal):
    dropout_by_token = False


CUTS = {
    "2 of 4": {"micro_batch_size": 4},
    "3 and 1 at a time": {"micro_batch_size": 3},
    "packed": {"packing": True, "max_length": ROW},
    "packed, 2 of 4, checkpointing": {
        "packing": True,
        "max_length": 512,
        "micro_batch_size": 4,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("dropout", [0.05, 0.1])
def test_micro_batches_packing_and_checkpointing_draw_the_same_dropout(shared, dropout):
    """Two processes: tests/loraf_train/processes/test_processes.py, whose tasks have dropout."""
    whole = fitted(shared, dropout)
    assert whole.abs().max() > 0.01
    for name, changes in CUTS.items():
        torch.testing.assert_close(
            fitted(shared, dropout, **changes), whole, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (fitted(shared, 0.0) - whole).abs().max() > 1e-2  # dropout has an effect
    before = [fitted(shared, dropout, BeforeByToken(), **changes) for changes in ({}, CUTS["2 of 4"])]
    assert (before[0] - before[1]).abs().max() > 1e-2  # as it was, the cut mattered as much


def test_each_step_draws_anew(shared, monkeypatch):
    """Three steps of the same examples, each an epoch."""
    base, earlier, positions = shared
    drawn, draw = [], ModuleDraws.mask
    monkeypatch.setattr(ModuleDraws, "mask", lambda self, *a: drawn.append((self, draw(self, *a))) or drawn[-1][1])
    with attached(base.model, base.layers(positions, 2.0, earlier, 0.5)):
        phase = toys.phase(seed=11, learning_rate=0.01, batch_size=8, max_steps=3)
        loop.fit(base.model, toys.examples(1, 8), phase, base.pad_id, lambda *_: None)
    of_first = [mask for draws, mask in drawn if draws is drawn[0][0]]
    rows = [{row.numpy().tobytes() for row in mask} for mask in of_first]
    assert len(rows) == 3  # nothing needs the gradient of the first module's input, so its backward pass draws none
    assert not (rows[0] & rows[1] or rows[1] & rows[2] or rows[0] & rows[2])


def test_a_batch_says_which_example_and_place_each_token_has():
    numbered = [(i, example) for i, example in zip((7, 3, 5), toys.examples(1, 3), strict=True)]
    lengths = [len(example.input_ids) for _, example in numbered]
    padded = NumberedCollator(Collator(toys.PAD))(numbered)
    packed = NumberedCollator(PackingCollator(toys.PAD, 512))(numbered)
    for row, (number, length) in enumerate(zip((7, 3, 5), lengths, strict=True)):
        width = max(lengths)
        assert padded[EXAMPLES][row].tolist() == [number] * length + [-1] * (width - length)
        assert padded[PLACES][row, :length].tolist() == list(range(length))
    assert packed[EXAMPLES].tolist() == [[7] * lengths[0] + [3] * lengths[1] + [5] * lengths[2]]
    assert torch.equal(packed[PLACES], packed["position_ids"])


# --- what base models draw themselves ---------------------------------------------------------------------------------

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
OWN = {
    "opt": SIZES
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}
    | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": SIZES | {"intermediate_size": 64} | NEOX,
    "phi": SIZES | {"intermediate_size": 64, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4} | NEOX,
    "falcon": SIZES | NEOX,
    "gpt_bigcode": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}
    | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "mixtral": SIZES
    | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    | {"attention_dropout": 0.3, "router_jitter_noise": 0.3},
    "llama": SIZES | {"intermediate_size": 64, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", OWN)
def test_a_base_model_draws_nothing_itself_while_it_trains(architecture, attention):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **OWN[architecture])
    if architecture == "bloom" and attention == "sdpa":
        attention = None  # it has its own
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    ids = torch.randint(3, 300, (2, 12))

    def twice_the_same() -> bool:
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        return torch.equal(first, second)

    before = {(id(holder), name): getattr(holder, name) for holder, name in own_randomness(model)}
    assert before and not twice_the_same()
    with drawn_by_token(model, 1):
        assert own_randomness(model) == [] and twice_the_same()
        model.eval()
        expected = model(input_ids=ids, use_cache=False).logits
        model.train()
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert {(id(holder), name): getattr(holder, name) for holder, name in own_randomness(model)} == before
    assert not twice_the_same()
