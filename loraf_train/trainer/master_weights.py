"""AdamW for weights that are narrower than float32: it trains a float32 copy, and rounds the weights from it.

A step of 1e-5 is lost where it is less than half of the distance between two bfloat16 numbers, which is 6e-5 at a
weight of 0.02: rounded after each step, such a weight would never move. In the copy the steps add up.

Per bfloat16 weight it takes 16 bytes: weight 2, gradient 2, copy 4, two moments 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with float32 weights and moments, whatever the parameters' dtype.

    The state of a narrower parameter has a float32 `master`; the parameter is its rounding. Otherwise the state has the
    names of torch.optim.AdamW.

    Args:
        parameters: in one group; none narrower than 16 bits.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # without a closure there is no loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # one at a time: only one gradient is held in float32
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        narrow = parameter.dtype != wide
        if not state:
            if narrow:
                state["master"] = parameter.detach().to(wide)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
            state["step"] = torch.zeros((), device=parameter.device)
        weight = state["master"] if narrow else parameter
        assert parameter.grad is not None
        adamw(
            [weight],
            [parameter.grad.to(wide)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if narrow:
            parameter.copy_(weight)
