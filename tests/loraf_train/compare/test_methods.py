"""The methods of a comparison: each agrees with a plain training loop, and all restore the base."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf.manifest import positions_per_matrix
from loraf.matrices import projection
from loraf.matrices.sparse import SparseB
from loraf_train.compare import methods
from loraf_train.retention import of_task
from loraf_train.sequence import runner
from loraf_train.settings.parts import RetentionConfig
from loraf_train.trainer import loop
from loraf_train.trainer.order import EpochOrder, derived_seed
from tests.loraf_train import toys
from tests.standins import make_model

SHIFTS = {"one": 3, "two": 50}
SEED = 7
PROBE = toys.batch(toys.examples(7, 6))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def config_of(model_folder, folder, **training):
    training = {"weight_decay": 0.1, **training}
    tasks = [toys.task("one", alpha=16.0, training=training), toys.task("two", alpha=4.0, training=training)]
    return toys.run_config(model_folder, folder / "ckpt", *tasks, seed=SEED, adapter={"dtype": "float32"})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Recorder(methods.Listener):
    """Records the model's weights at every event at which something is measured."""

    def __init__(self, bench):
        self.bench = bench
        self.events: list[str] = []
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self.as_trained_weights: dict[str, dict[str, torch.Tensor]] = {}
        self.selected_weights: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        self.outcomes: dict[str, methods.TrainedTask] = {}
        self.positions: dict[str, dict[str, torch.Tensor]] = {}

    def started(self, task):
        self.events.append(f"started {task.name}")

    def ended(self, task):
        self.events.append(f"ended {task.name}")

    def trained(self, task, outcome):
        self.events.append(f"trained {task.name}")
        self.weights[task.name], self.outcomes[task.name] = weights(self.bench.model), outcome
        if (self.bench.scratch / "loraf.json").exists():
            b = Checkpoint.open(self.bench.scratch).tasks[task.name]
            self.positions[task.name] = {module: part.positions for module, part in b.items()}

    def as_trained(self, task):
        self.as_trained_weights[task.name] = weights(self.bench.model)

    def selected(self, tasks):
        self.selected_weights[tuple(task.name for task in tasks)] = weights(self.bench.model)


def train(name: str, config, folder) -> tuple[Recorder, dict[str, torch.Tensor]]:
    """Trains a method; returns the records and the base's weights, and checks that those are restored."""
    loaded = runner.load_model(config)
    before = weights(loaded[0])
    bench = methods.Bench(loaded, {name: toys.data(shift) for name, shift in SHIFTS.items()}, folder / "scratch")
    recorder = Recorder(bench)
    methods.ALL[name].train(bench, config, recorder)
    after = weights(loaded[0])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in loaded[0].parameters())
    assert not hasattr(loaded[0], "peft_config")
    tasks = list(SHIFTS)[-1:] if name == "joint" else SHIFTS
    assert recorder.events == [f"{event} {task}" for task in tasks for event in ("started", "ended", "trained")]
    return recorder, before


def fit_plainly(model, parameters, config, task) -> None:
    """Trains with AdamW on the examples in the same order, in plain torch."""
    training, examples = task.training, toys.examples(SHIFTS[task.name])
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    order = EpochOrder(len(examples), derived_seed(config.seed, task.name, "adaptation"))
    batches = []
    for epoch in range(2):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [indices[i : i + training.batch_size] for i in range(0, len(indices), training.batch_size)]
    for indices in itertools.islice(batches, training.max_steps):
        batch = toys.batch([examples[i] for i in indices])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_change(actual, expected, before) -> None:
    """Of every tensor, up to a thousandth of the change: where a gradient is almost zero, AdamW amplifies its noise."""
    assert actual.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 1e-3 * (tensor - before[name]).norm(), name


def test_full_trains_every_parameter_as_a_plain_loop_does(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path, learning_rate=1e-3)
    recorder, before = train("full", config, tmp_path)
    plain = toys.load(model_folder).requires_grad_(True)
    for task in config.tasks:
        fit_plainly(plain, list(plain.parameters()), config, task)
        assert_same_change(recorder.weights[task.name], weights(plain), before)
    first, second = recorder.weights.values()
    assert all(not torch.equal(first[name], before[name]) for name in before)
    assert all(not torch.equal(second[name], first[name]) for name in before)
    for outcome in recorder.outcomes.values():
        assert outcome.trainable == sum(p.numel() for p in plain.parameters())
        assert outcome.steps == 4
        plain.save_pretrained(tmp_path / "plain")
        assert outcome.file_bytes == (tmp_path / "plain" / "model.safetensors").stat().st_size


def test_lora_is_pefts_with_each_task_merged_before_the_next(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    recorder, before = train("lora", config, tmp_path)
    plain = toys.load(model_folder)
    for task in config.tasks:
        torch.manual_seed(derived_seed(SEED, task.name, "lora"))
        targets = ["q_proj", "v_proj", "down_proj"]
        adapted = peft.get_peft_model(plain, peft.LoraConfig(r=8, lora_alpha=task.alpha, target_modules=targets))
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        fit_plainly(adapted, parameters, config, task)
        adapted.save_pretrained(tmp_path / "adapter")
        plain = adapted.merge_and_unload()
        assert_same_change(recorder.weights[task.name], weights(plain), before)
        outcome = recorder.outcomes[task.name]
        assert outcome.trainable == sum(p.numel() for p in parameters)
        # The same tensors; the metadata that PEFT adds has the same length.
        assert outcome.file_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    moved = {name for name in before if not torch.equal(recorder.weights["two"][name], before[name])}
    assert {name.rsplit(".", 2)[-2] for name in moved} == {"q_proj", "v_proj", "down_proj"}


def test_loras_initial_adapter_depends_on_the_seed(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    one, _ = train("lora", config, tmp_path)
    other, _ = train("lora", config.model_copy(update={"seed": SEED + 1}), tmp_path / "other")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one.weights["one"][name], other.weights["one"][name])


def test_frozen_a_trains_all_of_b_and_each_task_continues_with_it(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    recorder, before = train("frozen-a", config, tmp_path)
    plain = toys.load(model_folder)
    layers = {}
    for name, base in [(n, m) for n, m in plain.named_modules() if n.rsplit(".", 1)[-1] in ("q_proj", "v_proj")] + [
        (n, m) for n, m in plain.named_modules() if n.endswith("down_proj")
    ]:
        a = torch.from_numpy(projection.projection(SEED, name, 8, base.in_features))
        zeros = torch.zeros(base.out_features, 8)
        layers[name] = toys.DenseLoraf(base, a, 1.0, zeros)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layers[name])
    product = {name: torch.zeros_like(layer.b.data) for name, layer in layers.items()}
    for task in config.tasks:
        scale = task.alpha / 8
        for name, layer in layers.items():
            layer.scale = scale
            layer.b.data = product[name] / scale
        fit_plainly(plain, [layer.b for layer in layers.values()], config, task)
        for name, layer in layers.items():
            assert bool((layer.b != product[name] / scale).all())
            product[name] = layer.b.data * scale
            expected = before[f"{name}.weight"] + product[name] @ layer.a
            key = f"{name}.weight"
            assert_same_change({key: recorder.weights[task.name][key]}, {key: expected}, {key: before[key]})
        assert recorder.outcomes[task.name].trainable == sum(layer.b.numel() for layer in layers.values())
        assert recorder.outcomes[task.name].file_bytes > 4 * recorder.outcomes[task.name].trainable


def test_loraf_is_this_projects_own_sequence(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    recorder, _ = train("loraf", config, tmp_path)
    data = {name: toys.data(shift) for name, shift in SHIFTS.items()}
    checkpoint = runner.run(config, data)
    for name, positions in recorder.positions.items():
        stored = checkpoint.manifest.task(name)
        assert {m: t.tolist() for m, t in positions.items()} == {
            m: b.positions.tolist() for m, b in checkpoint.tasks[name].items()
        }
        outcome = recorder.outcomes[name]
        assert (outcome.trainable, outcome.file_bytes) == (stored.parameters, stored.file.bytes)
        assert outcome.steps == 2 + 4  # calibration, training
        assert {share.module: share.positions for share in outcome.masks} == stored.k
        assert {share.size for share in outcome.masks if "q_proj" in share.module} == {128 * 8}
    for name, as_trained in recorder.as_trained_weights.items():  # at the end each is as it was when just trained
        assert all(torch.equal(as_trained[n], tensor) for n, tensor in recorder.weights[name].items())
    assert list(recorder.as_trained_weights) == list(SHIFTS)


@pytest.mark.parametrize("name", ["loraf-paper", "random-mask"])
def test_without_retention_loraf_is_loraf_paper(model_folder, tmp_path, name):
    """The file's retention matters to loraf alone; a small budget makes its effect visible."""
    off = config_of(model_folder, tmp_path).model_copy(update={"retention": None})
    on = off.model_copy(update={"retention": RetentionConfig(budget=1e-3)})
    of_paper = train(name, on, tmp_path / "on")[0].weights["two"]
    of_off = train("loraf" if name == "loraf-paper" else name, off, tmp_path / "off")[0].weights["two"]
    assert all(torch.equal(of_paper[n], of_off[n]) for n in of_paper)
    assert methods.ALL[name].settings(on, on.tasks[0]) == methods.ALL[name].settings(off, off.tasks[0])
    if name == "loraf-paper":
        kept = train("loraf", on, tmp_path / "kept")[0].weights["two"]
        assert any(not torch.equal(of_paper[n], kept[n]) for n in of_paper)


def test_at_the_end_the_model_holds_each_tasks_own_values(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    recorder, before = train("loraf-paper", config, tmp_path)
    assert list(recorder.selected_weights) == [("one",), ("two",)]
    one, two = (recorder.selected_weights[name,] for name in SHIFTS)
    for name, tensor in recorder.weights["two"].items():  # both on
        assert torch.equal(one[name], recorder.weights["one"][name])
        torch.testing.assert_close(one[name] - before[name] + two[name], tensor, rtol=0, atol=1e-6)


def test_a_random_mask_has_k_positions_that_no_other_task_owns(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    one, _ = train("random-mask", config, tmp_path)
    other, _ = train("random-mask", config.model_copy(update={"seed": SEED + 1}), tmp_path / "other")
    calibrated, _ = train("loraf", config, tmp_path / "calibrated")
    for module, first in one.positions["one"].items():
        d_out = 64 if "v_proj" in module else 128
        second = one.positions["two"][module]
        assert len(first) == len(second) == positions_per_matrix(0.75, d_out, 8)
        assert not set(first.tolist()) & set(second.tolist())
        assert int(first.min()) >= 0 and int(first.max()) < d_out * 8
        assert first.tolist() != other.positions["one"][module].tolist()
        assert first.tolist() != calibrated.positions["one"][module].tolist()
    assert one.outcomes["one"].steps == 4  # no calibration
    assert one.outcomes["one"].trainable == calibrated.outcomes["one"].trainable


def test_a_random_mask_is_drawn_evenly_from_the_free_positions(model_folder, tmp_path):
    """1,000 masks of a quarter of 1,024 positions, of which another task holds the first half."""
    base, checkpoint = toys.trainable_base(model_folder, tmp_path / "ckpt")
    taken = toys.taken(checkpoint)
    task = toys.task("one")
    module = next(iter(base.targets))
    half = SparseB.from_positions(torch.arange(512), torch.zeros(512), (128, 8))
    taken[module] = [half]
    counts = torch.zeros(1024)
    for seed in range(1000):
        drawn = methods.RandomMask.select_positions(base, task, [], taken, {}, seed)[module]
        assert len(drawn) == 256 and bool((drawn[1:] > drawn[:-1]).all())
        counts[drawn] += 1
    assert counts[:512].sum() == 0
    expected = 1000 * 256 / 512
    chi_square = float(((counts[512:] - expected) ** 2 / (expected * 0.5)).sum())
    assert 512 - 5 * 32 < chi_square < 512 + 5 * 32  # about 511 ± 32


def test_settings_hold_only_what_the_method_uses(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path)
    keys = {name: set(method.settings(config, config.tasks[0])) for name, method in methods.ALL.items()}
    lora = {"alpha", "training", "rank", "target_modules"}
    assert keys["lora"] == lora | {"dtype"}
    assert keys["frozen-a"] == lora | {"init_std", "dtype"}
    assert keys["random-mask"] == keys["frozen-a"] | {"sparsity", "start"}
    assert keys["loraf-paper"] == keys["random-mask"] | {"calibration"}
    assert keys["loraf"] == keys["loraf-paper"] | {"retention"}
    assert keys["lora-decay"] == keys["separate"] == keys["joint"] == keys["lora"]
    assert keys["o-lora"] == keys["ewc"] == keys["replay"] == keys["lora"] | {"strength"}
    assert keys["full"] == {"training", "dtype"}
    assert "dropout" not in methods.ALL["full"].settings(config, config.tasks[0])["training"]


def test_pefts_dropout_is_drawn_by_token_too(model_folder, tmp_path):
    ends = []
    for changes in ({}, {"micro_batch_size": 3, "packing": True}):
        config = config_of(model_folder, tmp_path, dropout=0.1, max_steps=2, **changes)
        ends.append(train("lora", config, tmp_path)[0].weights["two"])
    without = train("lora", config_of(model_folder, tmp_path, max_steps=2), tmp_path)[0].weights["two"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (without[name] - ends[0][name]).abs().max() > 1e-3
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", methods.ALL)
def test_on_a_bfloat16_base_every_method_trains_float32_values(model_folder, tmp_path, monkeypatch, name):
    config = config_of(model_folder, tmp_path, max_steps=1).model_copy(update={"precision": "bfloat16"})
    updated, make = [], loop.optimizer_of

    def made(phase, parameters):
        optimizer = make(phase, parameters)
        step = optimizer.step

        def stepping(*arguments):
            step(*arguments)
            updated.append({t.dtype for p in parameters for t in (*optimizer.state[p].values(), p)})
            updated.append({optimizer.state[p].get("master", p).dtype for p in parameters})

        optimizer.step = stepping
        return optimizer

    monkeypatch.setattr(loop, "optimizer_of", made)
    train(name, config, tmp_path)
    widths = {torch.float32, torch.bfloat16} if name == "full" else {torch.float32}
    assert updated[::2] == [widths] * len(updated[::2]) and updated[1::2] == [{torch.float32}] * len(updated[1::2])
    assert updated


@pytest.mark.slow
def test_every_method_learns_with_dropout_packing_and_checkpointing(model_folder, tmp_path):
    training = {"dropout": 0.3, "packing": True, "max_length": 64, "gradient_checkpointing": True, "max_steps": 2}
    config = config_of(model_folder, tmp_path, **training)
    for name in methods.ALL:
        recorder, before = train(name, config, tmp_path / name)
        assert any(not torch.equal(recorder.weights["two"][n], before[n]) for n in before)


def test_a_task_that_nothing_protects_is_not_compared_as_protected(model_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(of_task, "gather", fail)
    off = config_of(model_folder, tmp_path).model_copy(update={"retention": None})
    train("loraf", off, tmp_path / "off")
    with pytest.raises(ConfigError, match="statistics of task 'one' could not be gathered, so nothing protects it"):
        train("loraf", off.model_copy(update={"retention": RetentionConfig(budget=0.2)}), tmp_path / "on")
