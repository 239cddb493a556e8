"""Packed rows against the same examples alone: losses, steps, whole tasks; and models that mix packed examples."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.data.examples import Example
from loraf_train.sequence import runner
from loraf_train.trainer import batches, loop
from loraf_train.trainer.packing import PackingCollator, first_fit, require_separate
from tests.loraf_train import toys
from tests.standins import ARCHITECTURES, make_model

ROW = 40  # tokens; the toys' examples have 7 to 15


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make_model(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def plain(folder, **options) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def windowed(folder, **options) -> transformers.PreTrainedModel:
    """The model with a sliding window of five tokens; Qwen2 has it in its second layer only."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sliding_window = 5
    if config.model_type == "qwen2":
        config.use_sliding_window = True
        config.layer_types = ["full_attention", "sliding_attention"]
    return plain(folder, config=config, **options)


def losses(model, batch: dict[str, torch.Tensor], rows: list[list[int]], examples) -> torch.Tensor:
    """Mean loss of each example, (examples,), in their order."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits.float()
    of_examples = torch.zeros(len(examples))
    for r, row in enumerate(rows):
        begin = 0
        for i in row:
            end = begin + len(examples[i].input_ids)
            labels = batch["labels"][r, begin + 1 : end]
            of_examples[i] = torch.nn.functional.cross_entropy(logits[r, begin : end - 1], labels)
            begin = end
    return of_examples


# --- rows ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 32))
def test_first_fit_follows_its_definition(lengths, capacity):
    rows = first_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = []
    for i, length in enumerate(lengths):  # every example is in the first row that had room at its turn
        place = next(r for r, row in enumerate(rows) if i in row)
        assert all(full + length > capacity for full in used[:place])
        if place == len(used):
            used.append(length)
        else:
            assert used[place] + length <= capacity
            used[place] += length


def test_rows_are_filled_and_position_ids_restart_for_each_example_and_the_padding():
    examples = [
        Example([1, 5, 6, 2], 2),
        Example([4, 3, 2], 0),
        Example([1, 7, 8, 9, 2], 2, ((3, 4),)),
        Example([1], 1),
    ]
    batch = PackingCollator(99, 8)(examples)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2, 4, 3, 2, 1], [1, 7, 8, 9, 2, 99, 99, 99]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    o = -100
    assert batch["labels"].tolist() == [[o, o, 6, 2, o, 3, 2, o], [o, o, 8, o, 2, o, o, o]]


# --- the same losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral-window", "qwen2-window"])
def test_every_packed_example_has_the_same_loss_as_alone(folders, architecture, attention):
    options = {"dtype": torch.float32, "attn_implementation": attention}
    name, window, _ = architecture.partition("-window")
    load = windowed if window else plain
    model = load(folders[name], **options)
    examples = toys.examples(3, 20)
    rows = first_fit([len(e.input_ids) for e in examples], ROW)
    assert max(map(len, rows)) >= 3 and len(rows) >= 5
    packed = losses(model, PackingCollator(toys.PAD, ROW)(examples), rows, examples)
    alone = torch.cat([losses(model, toys.batch([e]), [[0]], [e]) for e in examples])
    assert (packed - alone).abs().max() < 1e-5
    if window:  # the window has an effect
        unbounded = plain(folders[name], **options)
        free = torch.cat([losses(unbounded, toys.batch([e]), [[0]], [e]) for e in examples])
        assert (free - alone).abs().max() > 1e-2
    # The comparison can fail: with continuous position ids, examples attend to those before them.
    mixed = PackingCollator(toys.PAD, ROW)(examples)
    mixed["position_ids"] = torch.arange(mixed["input_ids"].shape[1]).expand_as(mixed["input_ids"])
    assert (losses(model, mixed, rows, examples) - alone).abs().max() > 1e-2


# --- the same steps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(folders, tmp_path_factory):
    """A float64 model with an active earlier task, and positions for a new one."""
    base, checkpoint = toys.trainable_base(folders["mistral"], tmp_path_factory.mktemp("ckpt"), old=(12.0, 0.75))
    earlier = {module: earlier_tasks(checkpoint, ["old"], module) for module in base.targets}
    return base, earlier, {m: torch.arange(0, linear.out_features * 8, 3) for m, linear in base.targets.items()}


def fitted(shared, **changes) -> tuple[torch.Tensor, list[float]]:
    """Values of all modules after four steps of 8 of 20 examples, and the losses of the steps."""
    base, earlier, positions = shared
    settings = {"learning_rate": 3e-2, "batch_size": 8, "seed": 11, "max_steps": 4}
    layers, seen = base.layers(positions, 2.0, earlier, dropout=0.1), []
    with attached(base.model, layers):
        phase = toys.phase(**(settings | changes))
        loop.fit(base.model, toys.examples(1, 20), phase, base.pad_id, lambda loss, *_: seen.append(loss))
    return torch.cat([layer.values.detach() for layer in layers.values()]), seen


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": ROW},
        {"packing": True, "max_length": ROW, "micro_batch_size": 3},
        {"packing": True, "max_length": 512, "micro_batch_size": 2, "gradient_checkpointing": True},
        {"packing": True, "max_length": ROW, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
        {"micro_batch_size": 2},
        {"micro_batch_size": 1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_packing_accumulation_and_checkpointing_give_the_same_steps_as_the_whole_batch(shared, changes):
    """In float64, so that only rounding differs; 20 examples in batches of 8, so that the third step has 4."""
    without_effect = {"packing", "max_length", "micro_batch_size", "gradient_checkpointing"}
    expected, expected_losses = fitted(shared, **{key: v for key, v in changes.items() if key not in without_effect})
    actual, actual_losses = fitted(shared, **changes)
    assert expected.abs().max() > 1e-3
    # AdamW divides by the root of a square: where a gradient is almost zero, rounding determines the step.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert actual_losses == pytest.approx(expected_losses, rel=1e-6)


def test_the_loss_is_divided_by_the_tokens_of_the_step_not_of_the_row(folders):
    model = toys.load(folders["llama"])
    examples = toys.examples(5, 8)
    (packed, alone) = (collate(examples) for collate in (PackingCollator(toys.PAD, ROW), batches.Collator(toys.PAD)))
    values = []
    for batch in (packed, alone):
        labels = batch.pop("labels")
        assert (labels[:, 1:] != -100).sum() == sum(len(e.input_ids) - e.prompt_length for e in examples)
        values.append(loop.completion_loss(model(**batch, use_cache=False), labels, num_items_in_batch=100))
    torch.testing.assert_close(*values)


def test_whole_tasks_get_the_same_positions_and_values(folders, tmp_path):
    ends = []
    for packing in (False, True):
        task = toys.task("t", training={"packing": packing, "max_length": ROW, "micro_batch_size": 4})
        config = toys.run_config(folders["qwen2"], tmp_path / f"{packing}", task, adapter={"dtype": "float32"})
        ends.append(runner.run(config, {"t": toys.data(7)}).tasks["t"])
    for module, plain in ends[0].items():
        packed = ends[1][module]
        common = torch.isin(plain.positions, packed.positions)
        assert common.float().mean() >= 0.99  # a tie within rounding may fall the other way
        at_same = packed.values[torch.isin(packed.positions, plain.positions)]
        torch.testing.assert_close(at_same, plain.values[common], rtol=1e-2, atol=1e-4)
    assert Checkpoint.open(tmp_path / "True").manifest.task("t").training["settings"]["training"].get("packing") is None


def test_packed_training_in_bfloat16_stays_near_float32(folders, tmp_path):
    ends = {}
    for precision in ("float32", "bfloat16"):
        task = toys.task("t", training={"packing": True, "max_length": ROW})
        config = toys.run_config(folders["mistral"], tmp_path / precision, task, precision=precision)
        ends[precision] = runner.run(config, {"t": toys.data(7)}).manifest.task("t").training
    assert ends["bfloat16"]["precision"] == "bfloat16"
    for which in ("first", "last"):
        assert ends["bfloat16"]["loss"][which] == pytest.approx(ends["float32"]["loss"][which], rel=0.03)
    assert ends["float32"]["loss"]["last"] < ends["float32"]["loss"]["first"]


# --- models that mix them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_that_separate_examples_pass_the_test(folders, architecture, dtype):
    model = toys.load(folders[architecture], dtype)
    model.train()
    require_separate(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_attention_mask_that_ignores_position_ids_is_refused(folders, monkeypatch, architecture, dtype):
    model = toys.load(folders[architecture], dtype)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ConfigError, match="training.packing: .* mixes the examples .* → set packing: false"):
        require_separate(model)


def recurrent() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, initializer_range=0.3)).eval()


def test_a_recurrent_model_is_refused():
    with pytest.raises(ConfigError, match="training.packing: .* → set packing: false"):
        require_separate(recurrent())


def test_training_refuses_such_a_model_before_its_first_step(shared, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    seen = []
    monkeypatch.setattr(loop._Trainer, "train", lambda *a, **k: seen.append(a))
    with pytest.raises(ConfigError, match="set packing: false"):
        fitted(shared, packing=True, max_length=ROW)
    assert not seen
