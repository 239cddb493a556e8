"""The model that a task in training is compared with: the same one without the task's own values.

Earlier tasks stay on, so it is the model that the task began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loraf_train.adapter.layer import LorafLinear


@contextmanager
def values_off(model: nn.Module) -> Iterator[None]:
    """Takes the values in training for 0, and dropout off, for a `with` block that computes no gradient."""
    layers = [module for module in model.modules() if isinstance(module, LorafLinear)]
    values = [layer.values.data for layer in layers]
    was_training = model.training
    try:
        model.train(False)
        for layer in layers:
            layer.values.data = torch.zeros_like(layer.values.data)
        yield
    finally:
        for layer, before in zip(layers, values, strict=True):
            layer.values.data = before
        model.train(was_training)
