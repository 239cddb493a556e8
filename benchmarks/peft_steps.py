"""Compares training steps of `loraf-train`'s layer with those of the same layer as a method of PEFT.

    python benchmarks/peft_steps.py              # two minutes on two quiet cores; writes results/peft_steps.json
    python benchmarks/peft_steps.py --rounds 2 --layers 2 --sequence 64 --out -
    python benchmarks/peft_steps.py --device cuda --shape mistral-7b --dtype bfloat16 --sequence 2048 --batch 1

Both train the same positions of the same weights, with fused AdamW and clipping, in one process. They alternate, one
step at a time; which begins is drawn. Ratios are computed within a round and reported as the median over rounds with a
95 % bootstrap interval. The first step of each cell is discarded. In a cell with two tasks a finished one is on, as
when the next one trains; retention is left out, since its penalty is the same code in both.

Checked before anything is timed: both begin with the same loss, and without dropout end with the same values.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.measuring import commit, interval, machine  # noqa: E402
from benchmarks.training_methods import SHAPES, Cell, Setting, make_batch, make_model  # noqa: E402
from loraf_train.adapter.layer import LorafLinear  # noqa: E402
from loraf_train.adapter.trainable_base import attached  # noqa: E402
from loraf_train.peft import LorafConfig  # noqa: E402
from loraf_train.peft.model import LorafModel, tuner_of  # noqa: E402
from loraf_train.settings.parts import PROJECTIONS  # noqa: E402
from loraf_train.trainer.loop import completion_loss  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "peft_steps.json"
TASKS = ("first", "second")
SAME = 1e-5  # largest difference of values after the steps that are compared, in float32


class Pair:
    """One model, trained through PEFT or with `loraf-train`'s layers in place of PEFT's.

    Args:
        tasks: 1, or 2: the first is finished and on.
    """

    def __init__(self, setting: Setting, tasks: int, dropout: float):
        self.setting = setting
        self.model: Any = None
        for name in TASKS[:tasks]:
            config = LorafConfig(
                task_name=name,
                r=setting.rank,
                sparsity=setting.sparsity,
                target_modules=list(PROJECTIONS),
                dropout=dropout,
                retention=None,
            )
            if self.model is None:
                self.model = peft.get_peft_model(make_model(setting), config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
            self._calibrated(tuner_of(self.model), name, is_last=name == TASKS[tasks - 1])
            self.model.set_adapter(name)
        self.name = name
        tuner = tuner_of(self.model)
        tasks_of = {module: layer.task(name) for module, layer in tuner.layers().items()}
        self.plain = {
            module: LorafLinear(
                layer.linear,
                layer.loraf_a,
                tasks_of[module].positions.long(),
                tasks_of[module].scale,
                tuner.earlier(tuner.states[name].trained_with)[module],
                dropout,
            )
            for module, layer in tuner.layers().items()
        }
        self.optimizers = {
            "loraf-train": torch.optim.AdamW(
                [p.values for p in self.plain.values()], lr=1e-4, weight_decay=0, fused=True
            ),
            "peft": torch.optim.AdamW([t.values for t in tasks_of.values()], lr=1e-4, weight_decay=0, fused=True),
        }
        self.trained = {"loraf-train": self.plain, "peft": tasks_of}

    def _calibrated(self, tuner: LorafModel, name: str, is_last: bool) -> None:
        """Gives a task random positions, and values unless it is the last; finishes the one before."""
        generator = torch.Generator().manual_seed(self.setting.seed + 2)
        for other, state in tuner.states.items():
            state.is_finished = other != name
        for layer in tuner.layers().values():
            task = layer.task(name)
            free = torch.ones(layer.out_features * layer.rank, dtype=torch.bool)
            for other in tuner.finished():
                free[layer.task(other).positions.long().cpu()] = False
            at = free.nonzero().view(-1)
            chosen = at[torch.randperm(len(at), generator=generator)[: len(task.positions)]].sort().values
            task.choose(chosen.to(task.positions.device))
            if not is_last:
                task.values.data.normal_(std=1e-2)
        tuner.stand()

    def step(self, way: str, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Returns the loss and the seconds of a step: forward, backward, clipping, AdamW."""
        optimizer = self.optimizers[way]
        with ExitStack() as stack:
            if way == "loraf-train":
                stack.enter_context(attached(self.model.get_base_model(), self.plain))
            callee = self.model if way == "peft" else self.model.get_base_model()
            callee.train()
            _wait(self.setting)
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            outputs = callee(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            loss = completion_loss(outputs, batch["labels"])
            loss.backward()
            nn.utils.clip_grad_norm_([task.values for task in self.trained[way].values()], 1.0)
            optimizer.step()
            _wait(self.setting)
            return loss.item(), time.perf_counter() - begin

    def difference(self) -> float:
        """Returns the largest difference between the values that the two ways have trained."""
        pairs = [(self.plain[module].values, task.values) for module, task in self.trained["peft"].items()]
        return max(float((one - other).detach().abs().max()) for one, other in pairs)


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def main(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    setting = Setting(
        options.shape, dtype, options.device, options.rank, options.sparsity, options.sequence, options.layers
    )
    rng, before, cells = random.Random(1), machine(), []
    for tasks in options.tasks:
        for dropout in options.dropout:
            pair, batch = Pair(setting, tasks, dropout), make_batch(setting, options.batch)
            first = {way: pair.step(way, batch)[0] for way in pair.optimizers}
            tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            if not dropout and abs(first["peft"] - first["loraf-train"]) > tolerance * first["peft"]:
                raise SystemExit(f"the two do not begin with the same loss: {first}")
            if not dropout and dtype == torch.float32 and pair.difference() > SAME:
                raise SystemExit(f"the two do not train the same values: {pair.difference()}")
            seconds: dict[str, list[float]] = {way: [] for way in pair.optimizers}
            for _ in range(options.rounds):
                for way in rng.sample(list(pair.optimizers), 2):
                    seconds[way].append(pair.step(way, batch)[1])
            ratios = [ours / theirs for ours, theirs in zip(seconds["peft"], seconds["loraf-train"], strict=True)]
            cell = Cell(options.batch, dropout, checkpointing=False)
            row = {"tasks": tasks, "cell": cell.name, "peft_to_loraf_train": interval(ratios)}
            cells.append(row | {f"seconds {way}": interval(times) for way, times in seconds.items()})
            print(f"{tasks} tasks, {cell.name}: {statistics.median(ratios):.3f}", file=sys.stderr, flush=True)
    return {
        "question": "what does a step cost as a method of PEFT, next to loraf-train's?",
        "commit": commit(),
        "machine": before | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "setting": vars(setting) | {"dtype": options.dtype, "threads": torch.get_num_threads()},
        "rounds": options.rounds,
        "cells": cells,
    }


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--shape", choices=SHAPES, default="small")
    new.add_argument("--layers", type=int, help="instead of the shape's")
    new.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    new.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    new.add_argument("--rank", type=int, default=64)
    new.add_argument("--sparsity", type=float, default=0.9)
    new.add_argument("--sequence", type=int, default=256, help="tokens of an example")
    new.add_argument("--batch", type=int, default=4)
    new.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    new.add_argument("--tasks", type=int, choices=(1, 2), nargs="+", default=[1, 2])
    new.add_argument("--rounds", type=int, default=11)
    new.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    new.add_argument("--out", default=str(RESULT), help="- writes no file")
    return new


if __name__ == "__main__":
    options = parser().parse_args()
    result = main(options)
    text = json.dumps(result, indent=1, default=str)
    print(text)
    if options.out != "-":
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text + "\n")
