"""A small model with a LoRAF adapter, and batches of toy tasks, for the tests of the PEFT method."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from loraf_train.peft import LorafConfig, calibrate, protect
from loraf_train.peft.model import tuner_of
from tests.loraf_train import toys

TARGETS = ["q_proj", "v_proj", "down_proj"]
LEARNING_RATE = 2e-2


def config(name: str = "one", **fields: Any) -> LorafConfig:
    defaults = {"r": 8, "alpha": 16, "sparsity": 0.75, "target_modules": TARGETS, "dropout": 0.0, "dtype": "float32"}
    return LorafConfig(task_name=name, **(defaults | fields))


@functools.cache
def _loaded(folder: Path, precision: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=precision)


def base(folder: Path, precision: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(_loaded(folder, precision))


def adapted(folder: Path, precision: torch.dtype = torch.float32, adapter: str = "default", **fields: Any) -> Any:
    return get_peft_model(base(folder, precision), config(**fields), adapter_name=adapter)


def batches(move: int, count: int = 24, size: int = 8) -> list[dict[str, torch.Tensor]]:
    examples = toys.examples(move, count)
    return [toys.batch(examples[begin : begin + size]) for begin in range(0, count, size)]


def values(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.task(adapter).values.detach().clone() for name, layer in tuner_of(model).layers().items()}


def positions(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.task(adapter).positions.clone() for name, layer in tuner_of(model).layers().items()}


def loop(model: Any, data: list[dict[str, torch.Tensor]], steps: int = 4) -> list[float]:
    """Trains the active task in a loop of one's own."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    guard = protect(model, optimizer, steps)
    losses = []
    model.train()
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    guard.remove()
    model.eval()
    return losses


def trained(folder: Path, move: int = 3, steps: int = 4, **fields: Any) -> Any:
    """A model whose first task has been trained for some steps."""
    model = adapted(folder, **fields)
    calibrate(model, batches(move), steps=2, learning_rate=1e-2)
    loop(model, batches(move), steps)
    return model


@torch.no_grad()
def logits(model: Any, move: int = 3) -> torch.Tensor:
    was_training = model.training
    model.eval()
    batch = batches(move, 8)[0]
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(was_training)
    return out[batch["attention_mask"].bool()]
