"""Terms that methods add to the loss of an adapter, by their gradients; each remembers the tasks before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from loraf_train.trainer.penalty import Penalty

T = TypeVar("T")
Parameters = Mapping[str, torch.nn.Parameter]


class AdapterPenalty(Penalty):
    """A term for each task of a run. This base class adds nothing.

    As every Penalty its gradient is added after clipping, which limits that of the loss alone.
    """

    def begin(self, parameters: Parameters) -> None:
        """The next task begins; `parameters` are those of its adapter."""

    def end(self) -> None:
        """The task's training has ended."""


class Orthogonality(AdapterPenalty):
    """λ Σ |A·A_iᵀ|: absolute values, summed over all entries, modules and earlier tasks i.

    A and A_i are (rank, d_in) of one module. The derivative of |x| at 0 is taken to be 0.
    """

    def __init__(self, strength: float):
        self._strength = strength
        self._earlier: dict[str, torch.Tensor] = {}  # the rows of all earlier A, (tasks · rank, d_in)
        self._a: dict[str, torch.nn.Parameter] = {}

    def begin(self, parameters: Parameters) -> None:
        self._a = {name: p for name, p in parameters.items() if ".lora_A." in name}

    def end(self) -> None:
        for name, a in self._a.items():
            rows = [self._earlier[name]] if name in self._earlier else []
            self._earlier[name] = torch.cat([*rows, a.detach().clone()])

    @torch.no_grad()
    def add_gradient(self, step: int, steps: int) -> None:
        for name, earlier in self._earlier.items():
            a = self._a[name]
            assert a.grad is not None
            a.grad.add_((a @ earlier.T).sign() @ earlier, alpha=self._strength)


class Consolidation(AdapterPenalty):
    """λ/2 Σ F_i (θ − θ_i)²: elastic weight consolidation, summed over all parameters and earlier tasks i.

    θ_i are the parameters when task i had been trained, F_i the diagonal of the Fisher information there. The sums of
    F_i and of F_i θ_i are all that the gradient needs, however many tasks there are.
    """

    def __init__(self, strength: float):
        self._strength = strength
        self._information: dict[str, torch.Tensor] = {}
        self._centre: dict[str, torch.Tensor] = {}  # Σ F_i θ_i
        self._parameters: Parameters = {}

    def begin(self, parameters: Parameters) -> None:
        self._parameters = parameters

    @torch.no_grad()
    def remember(self, information: Mapping[str, torch.Tensor]) -> None:
        """Takes over the parameters as they are now, with their information for the task that has just ended."""
        for name, parameter in self._parameters.items():
            f = information[name]
            weighted = f * parameter
            self._information[name] = self._information[name] + f if name in self._information else f
            self._centre[name] = self._centre[name] + weighted if name in self._centre else weighted

    @torch.no_grad()
    def add_gradient(self, step: int, steps: int) -> None:
        for name, information in self._information.items():
            parameter = self._parameters[name]
            assert parameter.grad is not None
            parameter.grad.add_(information * parameter - self._centre[name], alpha=self._strength)


def fisher_diagonal(
    parameters: Parameters, examples: Sequence[T], loss_of: Callable[[T], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the empirical Fisher information of each parameter: the mean over examples of the squared gradient.

    Args:
        loss_of: returns the negative log-likelihood of one example.
    """
    names, tensors = list(parameters), list(parameters.values())
    totals = [torch.zeros_like(p) for p in tensors]
    for example in examples:
        gradients = torch.autograd.grad(loss_of(example), tensors)
        for total, gradient in zip(totals, gradients, strict=True):
            total.addcmul_(gradient, gradient)
    return {name: total / len(examples) for name, total in zip(names, totals, strict=True)}
