"""What retention costs: a training step with earlier tasks to protect beside one without, and gathering it.

    python benchmarks/retention.py                  # five minutes on two quiet cores; writes results/retention.json
    python benchmarks/retention.py --shapes toy --rounds 2 --out -
    python benchmarks/retention.py --shapes mistral-7b --device cuda --dtype bfloat16 --batch 1 --sequence 2048

Steps with 0, 1, 3 and 7 protected tasks alternate within a round, in random order, on the same model, batch and values.
Ratios are taken within a round and reported as the median over rounds with a 95 % bootstrap interval. `tiny` is the
embedded model with the batch of examples/retention; the other shapes have random weights, as in benchmarks/training.py.
Gathering is reported in steps without retention, so it can be set beside the number of steps of a task.

Checked before anything is timed: the gradient that one protected task adds is that of P by autograd.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, interval, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "retention.json"
COUNTS = (0, 1, 3, 7)
TINY_TOKENS = 24  # of an example of examples/retention, padding included


def drawn_statistics(layers, seed: int):
    """Statistics of random numbers; their values do not change what a step costs."""
    import torch

    from loraf_train.retention.extent import DIRECTIONS
    from loraf_train.retention.statistics import ModuleStatistics

    generator = torch.Generator().manual_seed(seed)
    return {
        name: ModuleStatistics(
            torch.randn(layer.out_features, DIRECTIONS, generator=generator) * 1e-3,
            torch.rand(layer.out_features, generator=generator) * 1e-6,
            torch.randn(layer.rank, layer.rank, generator=generator).tril() * 1e-2,
        )
        for name, layer in layers.items()
    }


def protection(layers, count: int):
    """A penalty for `count` earlier tasks, each with the later ones' values at random positions."""
    import torch

    from loraf_train.adapter.layer import EarlierTasks
    from loraf_train.retention.protection import ProtectedTask, Protection

    tasks = []
    for i in range(count):
        later = {}
        for name, layer in layers.items():
            generator = torch.Generator().manual_seed(i)
            size = layer.out_features * layer.rank
            positions = torch.randperm(size, generator=generator)[: len(layer.positions) if i < count - 1 else 0]
            later[name] = EarlierTasks(positions.to(torch.int32), torch.zeros(len(positions)))
        tasks.append(ProtectedTask(str(i), drawn_statistics(layers, i), later))
    return Protection(layers, tasks, budget=0.2)


def verify(layers) -> float:
    """Returns the largest relative error of the gradient of one protected task, against autograd."""
    import torch

    penalty = protection(layers, 1)
    statistics = drawn_statistics(layers, 0)
    for layer in layers.values():
        layer.values.data.normal_(std=0.01)
        layer.values.grad = torch.zeros_like(layer.values)
    penalty.add_gradient(0, 10)
    strength = float(penalty.state()["log_strength"].exp())
    worst = 0.0
    for name, layer in layers.items():
        values = layer.values.detach().double().requires_grad_()
        d = torch.zeros(layer.out_features * layer.rank, dtype=torch.float64, device=values.device)
        d = d.index_add(0, layer.positions.long(), values * layer.scale).view(-1, layer.rank)
        s = statistics[name].to(values.device)
        m = d @ (s.factor @ s.factor.t()).double()
        g_m = s.directions.double() @ (s.directions.double().t() @ m) + s.rest.double()[:, None] * m
        (expected,) = torch.autograd.grad((d * g_m).sum(), values)
        error = (layer.values.grad.double() / strength - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
        layer.values.data.zero_()
    return worst


def method_of(shape: str, options):
    """The model with the adapter's layers, and a batch."""
    import torch

    from benchmarks import training_methods

    dtype = getattr(torch, options.dtype)
    sequence, batch = (TINY_TOKENS, 32) if shape == "tiny" else (options.sequence, options.batch)
    setting = training_methods.Setting(
        "toy" if shape == "tiny" else shape, dtype, options.device, 64, 0.9, sequence, options.layers
    )
    if shape == "tiny":
        import transformers

        from loraf import base_model

        folder = base_model.resolve("tiny", None, "")
        make = training_methods.make_model
        training_methods.make_model = lambda _: transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        ).requires_grad_(False)
        method = training_methods.Method("loraf", setting)
        training_methods.make_model = make
    else:
        method = training_methods.Method("loraf", setting)
    method.prepare(training_methods.Cell(batch, 0.0, False))
    return method, training_methods.make_batch(setting, batch)


def measure(shape: str, options) -> dict[str, object]:
    import torch
    from torch import nn

    from loraf_train.data.examples import Example
    from loraf_train.retention.extent import EXAMPLES
    from loraf_train.retention.gather import gather

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    method, batch = method_of(shape, options)
    layers = method.adapters
    error = verify(layers)
    if error > 1e-4:
        raise SystemExit(f"{shape}: the gradient of the penalty is off by {error:g}")
    penalties = {count: protection(layers, count) if count else None for count in COUNTS}

    def step(count: int) -> float:
        wait()
        begin = time.perf_counter()
        method.optimizer.zero_grad(set_to_none=True)
        method.loss(batch).backward()
        nn.utils.clip_grad_norm_(method.trainable, 1.0)
        penalty = penalties[count]
        if penalty is not None:
            penalty.add_gradient(5, 10)
        method.optimizer.step()
        wait()
        return time.perf_counter() - begin

    chance = random.Random(0)
    ratios: dict[int, list[float]] = {count: [] for count in COUNTS[1:]}
    plain: list[float] = []
    for number in range(options.rounds + 1):
        order = list(COUNTS)
        chance.shuffle(order)
        seconds = {count: step(count) for count in order}
        if number:  # the first round warms up
            plain.append(seconds[0])
            for count in ratios:
                ratios[count].append(seconds[count] / seconds[0])
    ids = batch["input_ids"][0].tolist()
    examples = [Example(ids, len(ids) // 2) for _ in range(EXAMPLES)]
    wait()
    begin = time.perf_counter()
    gather(method.base, layers, examples, 0, seed=0)
    wait()
    gathering = time.perf_counter() - begin
    return {
        "examples of a step": len(batch["input_ids"]),
        "tokens of an example": len(ids),
        "error of the gradient": error,
        "seconds of a step without": interval(plain),
        "step with protected tasks, over one without": {str(count): interval(r) for count, r in ratios.items()},
        "gathering, in steps without": gathering / interval(plain)["median"],
        "examples gathered from": EXAMPLES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    before = machine()
    shapes = {shape: measure(shape, options) for shape in options.shapes}
    result = {"commit": commit(), "machine": before, "options": vars(options) | {"out": None}, "shapes": shapes}
    if options.device == "cuda":
        result["machine"] = before | {"gpu": torch.cuda.get_device_name()}
    text = json.dumps(result, indent=1)
    if options.out == "-":
        print(text)
    else:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
