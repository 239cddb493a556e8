"""Makes all that a forward pass draws depend on the tokens, not on how a batch is cut over micro-batches and processes.

The adapter's dropout is drawn by token. What a base model itself draws while it trains is switched off: its own
dropout, skipped layers, routing noise. transformers draws them from torch's generator, within attention kernels too.
`training.dropout` is there to regularise. Most models have nothing of their own; OPT, GPT-2 and Phi have dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from loraf_train.adapter.dropout import Dropout, TokenKeys
from loraf_train.adapter.layer import LorafLinear

_NAMES = ("drop", "jitter")  # parts of an attribute's name: attention_dropout, resid_pdrop, layerdrop, jitter_noise


@contextmanager
def drawn_by_token(model: nn.Module, seed: int) -> Iterator[TokenKeys]:
    """Lets the adapter's layers draw dropout by token in a `with` block, and switches off what the model itself draws.

    Yields:
        What must be set to the tokens of a batch before its forward pass.
    """
    tokens = TokenKeys(seed)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LorafLinear | Dropout)]
    probabilities = [(holder, name, getattr(holder, name)) for holder, name in own_randomness(model)]
    try:
        for name, layer in layers:
            layer.draws = tokens.of(name)
        for holder, name, _ in probabilities:
            setattr(holder, name, 0.0)
        yield tokens
    finally:
        for _, layer in layers:
            layer.draws = None
        for holder, name, probability in probabilities:
            setattr(holder, name, probability)


def own_randomness(model: nn.Module) -> list[tuple[Any, str]]:
    """Returns where the model or its configs hold a probability of their own above 0, as (object, attribute)."""
    found = []
    for module in model.modules():
        if isinstance(module, LorafLinear | Dropout):
            continue  # the adapter's
        found += [(module, name) for name in _set_probabilities(module)]
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            found.append((module, "p"))
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return found + [(config, name) for config in configs.values() for name in _set_probabilities(config)]


def _set_probabilities(holder: Any) -> list[str]:
    return [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value and any(part in name for part in _NAMES)
    ]
