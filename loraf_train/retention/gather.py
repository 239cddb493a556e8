"""Gathers a finished task's statistics from its own training examples.

A probe of the logits l of a completion token is ⟨ε, l − mean(l)⟩ with random ε, whose entries are ±1/√V for a
vocabulary of V. Its expected square under a change of the logits is the mean squared change of a logit (their common
shift left out, to which softmax is blind). So the gradient g of the probes at a module's output says how much the
module matters to the logits. Random probes rather than the loss: a task that is learned has almost no gradient left.

G is never formed: with a random test matrix Ω of a few columns more than are kept, Y = Σ g·(gᵀ·Ω) is added up, and
the leading directions follow from Y and Ω (Nyström; Halko, Martinsson and Tropp 2011, section 5.5).

The probes of an example depend on its number alone, so the statistics do not depend on how examples are batched. Every
process of a run computes the same, without talking to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraf_train.data.examples import IGNORED
from loraf_train.retention.extent import DIRECTIONS, EXAMPLES, ROUNDS
from loraf_train.retention.statistics import ModuleStatistics
from loraf_train.trainer.batches import Collator
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.adapter.layer import LorafLinear
    from loraf_train.data.examples import Example

TOKENS_AT_ONCE = 2048  # of a batch, padding included
_EXTRA_COLUMNS = 16  # of Ω beyond the directions kept
_SMALLEST = 1e-10  # of the largest eigenvalue; below it are rounding errors


def gather(
    model: PreTrainedModel,
    layers: Mapping[str, LorafLinear],
    examples: Sequence[Example],
    pad_id: int,
    seed: int,
    count: int = EXAMPLES,
    rounds: int = ROUNDS,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> dict[str, ModuleStatistics]:
    """Returns the statistics of the model as it is, with the layers' values.

    Args:
        layers: module → the layer that is in the model.
        examples: of the task's training; up to `count` of them are drawn.
        seed: determines which examples, the probes and Ω.
        rounds: probes of each completion token; a further one costs a backward pass.
        tokens_at_once: of a batch, padding included; at least one example.
    """
    sums = {name: _Sums(layer, name, seed) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(derived_seed(seed, "statistics"))
    chosen = sorted(torch.randperm(len(examples), generator=generator)[:count].tolist())
    was_training = model.training
    model.train(False)
    try:
        with _watched(model, sums) as captured:
            for numbers in _batches([len(examples[i].input_ids) for i in chosen], tokens_at_once):
                of_batch = [chosen[n] for n in numbers]
                batch = Collator(pad_id)([examples[i] for i in of_batch])
                _add(model, sums, captured, {k: v.to(model.device) for k, v in batch.items()}, of_batch, seed, rounds)
    finally:
        model.train(was_training)
    if not any(bool(of_module.squares.any()) for of_module in sums.values()):
        raise FloatingPointError("no module has a gradient, so nothing would be protected")
    tokens = rounds * sum(sum(label != IGNORED for label in examples[i].labels()) for i in chosen)
    return {name: of_module.statistics(max(1, tokens)) for name, of_module in sums.items()}


class _Sums:
    """What is added up over the tokens for one module, in float32 on its device."""

    def __init__(self, layer: LorafLinear, name: str, seed: int):
        self.layer = layer
        device, rank, d_out = layer.a.device, layer.rank, layer.out_features
        self.kept = min(DIRECTIONS, d_out)
        generator = torch.Generator().manual_seed(derived_seed(seed, name, "test matrix"))
        self.omega = torch.randn(d_out, min(self.kept + _EXTRA_COLUMNS, d_out), generator=generator).to(device)
        self.y = torch.zeros_like(self.omega)
        self.squares = torch.zeros(d_out, device=device)
        self.weighted_z = torch.zeros(rank, rank, device=device)

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Adds tokens. x: (tokens, d_in), g: (tokens, d_out)."""
        z = (x.to(self.layer.a.dtype) @ self.layer.a.t()).float()
        g = g.float()
        squares = g * g
        self.y.addmm_(g.t(), g @ self.omega)
        self.squares += squares.sum(0)
        self.weighted_z.addmm_((z * squares.sum(1, keepdim=True)).t(), z)

    def statistics(self, tokens: int) -> ModuleStatistics:
        y, omega = self.y.cpu().double() / tokens, self.omega.cpu().double()
        energy = float(self.squares.sum())
        if not math.isfinite(energy) or not bool(torch.isfinite(self.weighted_z).all()):
            raise FloatingPointError("the gradient of the logits is not finite")
        c = self.weighted_z.cpu().double() / energy if energy else self.weighted_z.cpu().double()
        directions = _leading(y, omega, self.kept)
        rest = (self.squares.cpu() / tokens - directions.square().sum(1)).clamp(min=0)
        return ModuleStatistics(directions, rest, _factor(c))


def _leading(y: torch.Tensor, omega: torch.Tensor, kept: int) -> torch.Tensor:
    """Returns the `kept` leading eigenvectors of G, times the roots of their eigenvalues, from Y = G·Ω."""
    core = omega.t() @ y
    values, vectors = torch.linalg.eigh((core + core.t()) / 2)
    sound = values > values.max().clamp(min=0) * _SMALLEST
    f = y @ (vectors[:, sound] / values[sound].sqrt())  # G ≈ F·Fᵀ
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    out = torch.zeros(len(y), kept, dtype=torch.float64)
    found = min(kept, len(s))
    out[:, :found] = u[:, :found] * s[:found]
    return out.float()


def _factor(c: torch.Tensor) -> torch.Tensor:
    """Returns a lower triangular L with C = L·Lᵀ; C may be singular."""
    values, vectors = torch.linalg.eigh((c + c.t()) / 2)
    root = vectors * values.clamp(min=0).sqrt()
    r: torch.Tensor = torch.linalg.qr(root.t(), mode="r").R  # C = root·rootᵀ = Rᵀ·R
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return (r * signs[:, None]).t().float().contiguous()


@contextmanager
def _watched(
    model: PreTrainedModel, sums: Mapping[str, _Sums]
) -> Iterator[list[tuple[_Sums, torch.Tensor, torch.Tensor]]]:
    """A context in which a forward pass lists (sums, input, output) of the layers, and needs no gradient of values."""
    captured: list[tuple[_Sums, torch.Tensor, torch.Tensor]] = []

    def from_here(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True).clone()  # CTRL scales it in place, which no leaf allows

    def capture(of_module: _Sums) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:  # some models call a layer without gradients; nothing is trained there
                captured.append((of_module, inputs[0].detach(), output))

        return keep

    handles = [model.get_input_embeddings().register_forward_hook(from_here)]
    try:
        for of_module in sums.values():
            of_module.layer.values.requires_grad_(False)
            handles.append(of_module.layer.register_forward_hook(capture(of_module)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        for of_module in sums.values():
            of_module.layer.values.requires_grad_(True)


def _add(
    model: PreTrainedModel,
    sums: Mapping[str, _Sums],
    captured: list[tuple[_Sums, torch.Tensor, torch.Tensor]],
    batch: Mapping[str, torch.Tensor],
    numbers: Sequence[int],
    seed: int,
    rounds: int,
) -> None:
    """Adds a batch. `numbers`: of its examples among the task's."""
    labelled = batch["labels"][:, 1:] != IGNORED
    captured.clear()
    with torch.enable_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        answers = logits[:, :-1][labelled]
    outputs = [output for _, _, output in captured]
    for round_ in range(rounds):
        probes = torch.cat(
            [
                _probes(int(count), answers.shape[-1], derived_seed(seed, "probe", number, round_), answers.device)
                for number, count in zip(numbers, labelled.sum(1), strict=True)
            ]
        )
        last = round_ == rounds - 1
        gradients = torch.autograd.grad(
            answers, outputs, probes.to(answers.dtype), retain_graph=not last, allow_unused=True
        )
        for (of_module, x, _), g in zip(captured, gradients, strict=True):
            if g is not None:  # padding on the right has a gradient of zero
                of_module.add(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))
    captured.clear()


def _probes(tokens: int, vocabulary: int, seed: int, device: torch.device) -> torch.Tensor:
    """Returns ε of a completion's tokens, (tokens, vocabulary), less its mean."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (tokens, vocabulary), generator=generator, dtype=torch.int8).to(device)
    epsilon: torch.Tensor = (2.0 * signs - 1.0) / vocabulary**0.5
    return epsilon - epsilon.mean(-1, keepdim=True)


def _batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Yields indices of examples, of about the same length, whose padded batch has at most so many tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > tokens_at_once:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
