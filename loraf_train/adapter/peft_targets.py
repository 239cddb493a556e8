"""Names under which PEFT finds a model's layers.

transformers fuses the experts of many models into one parameter when it loads them. For such a model PEFT takes a
target that is named like an expert's projection (`gate_proj`, wherever it stands) for the fused parameter, and leaves
the layer of that name without its adapter. A target that is named as a parameter (`….gate_proj.weight`) it takes
literally.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_EXPERT_PROJECTIONS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_FUSED_PROJECTIONS = ("gate_up_proj", "down_proj")


def peft_targets(model_type: str, modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns PEFT's `target_modules` and `target_parameters` for a model's layers.

    Args:
        model_type: of the model's config.
        modules: full names.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    conversions: Iterable[Any] = get_checkpoint_conversion_mapping(model_type) or ()  # type: ignore[no-untyped-call]
    fused = any(pattern.endswith(_FUSED_PROJECTIONS) for c in conversions for pattern in c.target_patterns)
    names: tuple[list[str], list[str]] = ([], [])
    for module in modules:
        by_weight = fused and module.rpartition(".")[2] in _EXPERT_PROJECTIONS
        names[by_weight].append(f"{module}.weight" if by_weight else module)
    return names
