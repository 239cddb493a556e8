"""Says which part of a mixture-of-experts model a run leaves alone.

transformers holds the routed experts of most such models as one parameter. Target modules that are named like an
expert's projection are then found elsewhere only: in a shared expert, or in layers without experts.
"""

from __future__ import annotations

from loraf.errors import Problem
from loraf_train.adapter.probe import numberless
from loraf_train.sequence.base_checks import BaseModelShape
from loraf_train.settings.config import RunConfig

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def untouched_experts(config: RunConfig, model: BaseModelShape) -> list[Problem]:
    """Returns a warning if the model has experts that no adapter changes, with what is adapted in their place."""
    if not model.experts:
        return []
    message = (
        f"{model.experts / model.parameters:.0%} of the model's weights are in its experts, which stay as they are"
    )
    named = [name for name in _PROJECTIONS if name in config.adapter.target_modules]
    modules = (name for name in model.modules if name.rpartition(".")[2] in named)
    places = dict.fromkeys(numberless(name.rpartition(".")[0]) for name in modules)
    if places:
        message += f"; {', '.join(named)} are adapted only in {', '.join(places)}"
    remedy = "expect the experts to be the base model's"
    return [Problem(message, "adapter.target_modules", str(config.file), remedy)]
