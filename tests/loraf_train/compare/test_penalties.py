"""What o-lora, ewc and replay add to the training of LoRA, against their written formulas."""

from __future__ import annotations

import pytest
import torch

from loraf_train.compare import methods
from loraf_train.compare.methods.lora import lora_targets, parameters_of
from loraf_train.compare.methods.penalties import Consolidation, Orthogonality, fisher_diagonal
from loraf_train.compare.methods.shared_lora import Ewc, Replay
from loraf_train.sequence import runner
from loraf_train.trainer import loop
from tests.loraf_train import toys
from tests.standins import make_model

NAMES = ("q.lora_A.default.weight", "q.lora_B.default.weight", "v.lora_A.default.weight")
SHIFTS = {"one": 3, "two": 50, "three": 90}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def drawn(seed: int) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 10), (10, 4), (4, 6))
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    parameters = {name: torch.nn.Parameter(draw) for name, draw in zip(NAMES, draws, strict=True)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def test_the_gradient_of_orthogonality_is_that_of_the_formula():
    """λ Σ_i Σ |A·A_iᵀ|, differentiated by autograd."""
    penalty, tasks = Orthogonality(0.7), [drawn(seed) for seed in range(3)]
    for parameters in tasks:
        penalty.begin(parameters)
        penalty.add_gradient(0, 1)
        penalty.end()
    assert all(not parameter.grad.any() for parameter in tasks[0].values())  # there is no earlier task
    for t in (1, 2):
        a = {name: tasks[t][name].detach().clone().requires_grad_() for name in NAMES}
        loss = sum(
            0.7 * (a[name] @ tasks[i][name].detach().T).abs().sum()
            for name in NAMES
            if "lora_A" in name
            for i in range(t)
        )
        loss.backward()
        for name in NAMES:
            expected = torch.zeros_like(a[name]) if "lora_B" in name else a[name].grad
            torch.testing.assert_close(tasks[t][name].grad, expected)


def test_orthogonality_remembers_the_values_at_the_end_of_a_task():
    penalty, first, second = Orthogonality(1.0), drawn(0), drawn(1)
    penalty.begin(first)
    penalty.end()
    kept = {name: parameter.detach().clone() for name, parameter in first.items()}
    with torch.no_grad():
        for parameter in first.values():
            parameter.zero_()
    penalty.begin(second)
    penalty.add_gradient(0, 1)
    expected = (second[NAMES[0]] @ kept[NAMES[0]].T).sign() @ kept[NAMES[0]]
    torch.testing.assert_close(second[NAMES[0]].grad, expected.detach())


def test_the_gradient_of_consolidation_is_that_of_the_formula():
    """λ/2 Σ_i Σ F_i (θ − θ_i)², differentiated by autograd."""
    penalty, tasks = Consolidation(3.0), [drawn(seed) for seed in range(3)]
    informations = [{name: drawn(seed + 10)[name].detach() ** 2 for name in NAMES} for seed in range(2)]
    for parameters, information in zip(tasks, informations, strict=False):
        penalty.begin(parameters)
        penalty.remember(information)
    penalty.begin(tasks[2])
    penalty.add_gradient(0, 1)
    theta = {name: tasks[2][name].detach().clone().requires_grad_() for name in NAMES}
    loss = sum(
        3.0 / 2 * (informations[i][name] * (theta[name] - tasks[i][name].detach()) ** 2).sum()
        for name in NAMES
        for i in range(2)
    )
    loss.backward()
    for name in NAMES:
        torch.testing.assert_close(tasks[2][name].grad, theta[name].grad)


def test_without_an_earlier_task_consolidation_adds_nothing():
    penalty, parameters = Consolidation(3.0), drawn(0)
    penalty.begin(parameters)
    penalty.add_gradient(0, 1)
    assert all(not parameter.grad.any() for parameter in parameters.values())


def test_the_fisher_diagonal_of_a_gaussian():
    """Of −log p(x) = (x − μ)²/2 + …, whose derivative by μ is μ − x: the mean of (μ − x)²."""
    mean = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    examples = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, -1.0])]
    information = fisher_diagonal({"mean": mean}, examples, lambda x: ((x - mean) ** 2).sum() / 2)
    torch.testing.assert_close(information["mean"], torch.tensor([(4 + 1) / 2, (4 + 1) / 2]))


def config_of(model_folder, folder, *names: str, **compare):
    tasks = [toys.task(name) for name in names]
    return toys.run_config(model_folder, folder / "ckpt", *tasks, seed=7, compare=compare)


def bench_of(config, folder, count: int = 24) -> methods.Bench:
    data = {name: toys.data(shift, count) for name, shift in SHIFTS.items()}
    return methods.Bench(runner.load_model(config), data, folder / "scratch")


def test_ewcs_information_is_the_squared_gradient_of_each_whole_completion(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path, "one")
    bench = bench_of(config, tmp_path, 3)
    (task,) = config.tasks
    penalty = Consolidation(1.0)
    with lora_targets(bench, config) as targets:
        adapted = targets.put_adapter(bench, config, task)
        parameters = parameters_of(adapted)
        penalty.begin(parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        Ewc().finish(bench, config, task, penalty, parameters)
        squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for example in bench.data["one"].train:
            ids = torch.tensor([example.input_ids])
            log_p = bench.model(input_ids=ids).logits[0].log_softmax(-1)
            total = sum(log_p[i - 1, ids[0, i]] for i in range(example.prompt_length, ids.shape[1]))
            total.backward()
            for name, parameter in parameters.items():
                squares[name] += parameter.grad**2 / 3
                parameter.grad = None
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
            with torch.no_grad():
                parameter.add_(1.0)
        penalty.add_gradient(0, 1)  # F · 1
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, squares[name], rtol=1e-3, atol=1e-7)
            assert squares[name].any()


@pytest.fixture
def fits(monkeypatch) -> list[dict]:
    """Records what every training gets."""
    recorded, fit = [], loop.fit

    def recording(model, examples, phase, *arguments, **options):
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        outcome = fit(model, examples, phase, *arguments, **options)
        end = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        recorded.append({"examples": list(examples), "settings": phase.settings, "start": start, "end": end})
        return outcome

    monkeypatch.setattr(loop, "fit", recording)
    return recorded


def test_replay_mixes_in_two_per_cent_of_each_earlier_task(model_folder, tmp_path, fits):
    config = config_of(model_folder, tmp_path, *SHIFTS)
    bench = bench_of(config, tmp_path, 200)
    methods.ALL["replay"].train(bench, config, methods.Listener())
    for t, fitted in enumerate(fits):
        own = bench.data[list(SHIFTS)[t]].train
        assert fitted["examples"][:200] == own
        mixed = fitted["examples"][200:]
        assert len(mixed) == 4 * t  # 2 % of 200
        for i, name in enumerate(list(SHIFTS)[:t]):
            part = mixed[4 * i : 4 * (i + 1)]
            assert all(example in bench.data[name].train for example in part)
            assert len({tuple(example.input_ids) for example in part}) == 4
        assert fitted["settings"].max_steps == 4


def test_replay_takes_as_many_steps_as_the_tasks_own_examples_and_at_least_one_earlier(model_folder, tmp_path, fits):
    training = {"max_steps": None, "epochs": 2}
    tasks = [toys.task(name, training=training) for name in ("one", "two")]
    config = toys.run_config(model_folder, tmp_path / "ckpt", *tasks)
    methods.ALL["replay"].train(bench_of(config, tmp_path), config, methods.Listener())
    assert [len(fitted["examples"]) for fitted in fits] == [24, 25]
    assert [fitted["settings"].max_steps for fitted in fits] == [6, 6]  # 2 epochs of 24 in batches of 8


@pytest.mark.parametrize("method", [Ewc(), Replay()])
def test_one_lora_is_trained_on(model_folder, tmp_path, fits, method):
    config = config_of(model_folder, tmp_path, *SHIFTS)
    method.train(bench_of(config, tmp_path), config, methods.Listener())
    for before, after in zip(fits, fits[1:], strict=False):
        assert all(torch.equal(before["end"][name], after["start"][name]) for name in before["end"])


def test_ewc_without_strength_is_one_lora_without_a_penalty_and_strength_holds_it(model_folder, tmp_path, fits):
    moved = []
    for strength in (0.0, 1e6):
        config = config_of(model_folder, tmp_path, "one", "two", methods={"ewc": {"strength": strength}})
        methods.ALL["ewc"].train(bench_of(config, tmp_path), config, methods.Listener())
        second = fits.pop()
        moved.append(sum(float((second["end"][n] - second["start"][n]).norm()) for n in second["end"]))
    assert moved[1] < moved[0]


def test_joint_trains_on_all_examples_for_all_steps(model_folder, tmp_path, fits):
    config = config_of(model_folder, tmp_path, *SHIFTS)
    bench = bench_of(config, tmp_path)
    methods.ALL["joint"].train(bench, config, methods.Listener())
    (fitted,) = fits
    assert fitted["examples"] == [example for data in bench.data.values() for example in data.train]
    assert fitted["settings"].max_steps == 12


def test_lora_decay_sets_the_weight_decay(model_folder, tmp_path, fits):
    config = config_of(model_folder, tmp_path, "one")
    for name in ("lora", "lora-decay"):
        methods.ALL[name].train(bench_of(config, tmp_path), config, methods.Listener())
    assert [fitted["settings"].weight_decay for fitted in fits] == [0.0, 0.3]


def test_o_lora_makes_adapters_more_orthogonal_than_lora_does(model_folder, tmp_path, fits):
    overlaps = []
    for name in ("lora", "o-lora"):
        config = config_of(model_folder, tmp_path, "one", "two")
        methods.ALL[name].train(bench_of(config, tmp_path), config, methods.Listener())
        first, second = fits.pop(0)["end"], fits.pop(0)["end"]
        overlaps.append(sum(float((second[n] @ first[n].T).abs().sum()) for n in first if "lora_A" in n))
    assert overlaps[1] < 0.9 * overlaps[0]
