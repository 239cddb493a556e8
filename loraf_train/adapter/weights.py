"""The weight of a frozen linear layer as numbers, whether it is stored as such or in four bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is in bitsandbytes' four bits."""
    # Only a parameter of its own: our layers show their base's weight, in a form that notices its use.
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


def weight_of(linear: nn.Linear) -> torch.Tensor:
    """Returns the weight, (d_out, d_in); one in four bits is unpacked."""
    if not is_quantised(linear):
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = linear.weight
    unpacked: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return unpacked


def computes_in(linear: nn.Linear) -> torch.dtype:
    """Returns the dtype that a layer computes in: that of its weight, or what a quantised weight is unpacked to."""
    weight: Any = linear.weight
    dtype: torch.dtype = weight.quant_state.dtype if is_quantised(linear) else weight.dtype
    return dtype
