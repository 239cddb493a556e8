"""A term that training adds to the loss by its gradient, once per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Penalty:
    """A function of the trained parameters alone, added to the loss of a phase.

    Its gradient is added after the loss's gradient has been summed over micro-batches, averaged over processes and
    clipped, so it depends on none of these. Every process adds the same. This base class adds nothing.
    """

    def add_gradient(self, step: int, steps: int) -> None:
        """Adds to `.grad` of the parameters it acts on.

        Args:
            step: optimizer steps done.
            steps: of the whole phase.
        """

    def accepts(self) -> bool:
        """Whether the parameters as they are may be the result of the phase. Every process answers the same."""
        return True

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what the next steps depend on besides the parameters, on the CPU; stored in the Snapshot."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` returned."""


NO_PENALTY = Penalty()
