"""One phase of training on transformers' Trainer: from examples to updated parameters, and nothing written to disk.

Calibration and adaptation are both such a phase. Everything that depends on chance is a function of the phase's seed:
the order of the examples of each epoch, and torch's own generators (dropout), which the Trainer seeds at its start.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from loraf.errors import ConfigError, Problem

if TYPE_CHECKING:
    from loraf_train.data import Example

IGNORED = -100  # the label that transformers' losses leave out
OnStep = Callable[[float, float, int, int], None]  # loss, learning rate, step from 1, number of steps


@dataclass(frozen=True)
class Phase:
    """How to optimize.

    Attributes:
        name: for messages, for example "calibration of task 'math'".
        steps: optimizer steps; None: as many as `epochs` take.
        batch_size: examples an optimizer step sees, over all processes and accumulation steps.
        micro_batch_size: most examples that a process takes at once; None: no limit.
        max_grad_norm: global norm that gradients are clipped to; 0: not clipped.
        seed: below 2³².
    """

    name: str
    learning_rate: float
    batch_size: int
    seed: int
    optimizer: str = "adamw"
    epochs: float = 1.0
    steps: int | None = None
    micro_batch_size: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a phase did. Losses are means over completion tokens; `first_loss` is that of the first step."""

    steps: int
    first_loss: float
    last_loss: float


def derived_seed(*parts: object) -> int:
    """A seed below 2³² for each distinct sequence of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Order(torch.utils.data.Sampler[int]):
    """All indices once an epoch, in an order that depends on the seed and the epoch's number alone."""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed("order", self._seed, self._epoch))
        return iter(torch.randperm(self._size, generator=generator).tolist())


@dataclass(frozen=True)
class Collator:
    """Examples to a batch padded on the right. Loss only on completions; position 0 is predicted from nothing."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, each (examples, longest) int64."""
        longest = max(len(e.input_ids) for e in examples)
        ids = [e.input_ids + [self.pad_id] * (longest - len(e.input_ids)) for e in examples]
        real = [[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]
        labels = []
        for e in examples:
            silent = max(1, e.prompt_length)
            rest = longest - len(e.input_ids)
            labels.append([IGNORED] * silent + e.input_ids[silent:] + [IGNORED] * rest)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(real),
            "labels": torch.tensor(labels),
        }


def completion_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Sum of cross entropies at the labelled tokens, in float32, divided by the number of them in the whole step.

    The same number as transformers' own loss; but only the rows that count are widened to float32.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    logits = outputs.logits[:, :-1][counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(logits, targets[counted], reduction="sum")
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def fit(model: PreTrainedModel, examples: Sequence[Example], phase: Phase, pad_id: int, on_step: OnStep) -> Outcome:
    """Trains the model's trainable parameters with a fresh optimizer.

    Raises:
        ConfigError: the batch does not divide over the processes, there are no examples, or the loss is not finite.
    """
    if not examples:
        raise ConfigError(Problem(f"{phase.name}: there are no examples to train on", remedy="give it records"))
    use_cache = model.config.use_cache
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(phase, parameters)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _Trainer(
                model=model,
                args=_arguments(phase, folder, model.device),
                train_dataset=examples,
                data_collator=Collator(pad_id),
                compute_loss_func=completion_loss,
                optimizers=(optimizer, None),
            )
            report = _Report(phase, on_step)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(report)
            trainer.train()
    finally:
        # What Trainer and accelerate leave behind: a config without a cache, training mode, and global state.
        model.config.use_cache = use_cache
        model.eval()
        if phase.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # a hook that enabling it put on the embedding
        optimizer.zero_grad()
        optimizer.state.clear()
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
    return Outcome(report.steps, report.first_loss, report.last_loss)


class _Trainer(transformers.Trainer):
    """Trainer with this project's order of examples."""

    def _get_train_sampler(self, train_dataset=None) -> Order:
        return Order(len(self.train_dataset), self.args.seed)

    def floating_point_ops(self, inputs) -> int:
        return 0  # an estimate that nobody reads; counting parameters at every step takes longer than a small step


class _Report(TrainerCallback):
    """Hands each step's loss on, and stops at one that is not finite."""

    def __init__(self, phase: Phase, on_step: OnStep):
        self._phase = phase
        self._on_step = on_step
        self.steps = 0
        self.first_loss = self.last_loss = math.nan

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end
        loss = logs["loss"]
        if not math.isfinite(loss):
            message = f"{self._phase.name}: the loss is {loss} at step {state.global_step}"
            remedy = f"use a learning rate below {self._phase.learning_rate:g}, or more warm-up steps"
            raise ConfigError(Problem(message, remedy=remedy))
        self.first_loss = loss if self.steps == 0 else self.first_loss
        self.last_loss = loss
        self.steps = state.global_step
        if state.is_world_process_zero:
            self._on_step(loss, logs["learning_rate"], state.global_step, state.max_steps)


def _optimizer(phase: Phase, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if phase.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=phase.learning_rate)
    return torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, fused=True)


def _arguments(phase: Phase, folder: str, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        seed=phase.seed,
        num_train_epochs=phase.epochs,
        max_steps=-1 if phase.steps is None else phase.steps,
        learning_rate=phase.learning_rate,
        lr_scheduler_type="constant_with_warmup" if phase.schedule == "constant" else phase.schedule,
        warmup_steps=phase.warmup_steps,
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
        gradient_checkpointing=phase.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one GPU: never torch's DataParallel
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = split_batch(
        phase.batch_size, phase.micro_batch_size, arguments.world_size
    )
    return arguments


def split_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(examples a process takes at once, accumulation steps): their product times the processes is `batch_size`.

    Of the splits with at most `micro_batch_size` at once, the one with the fewest accumulation steps.

    Raises:
        ConfigError: the batch cannot be divided evenly over the processes.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        message = f"{batch_size} examples cannot be divided over {processes} processes"
        remedy = f"use a multiple of {processes}"
        raise ConfigError(Problem(message, "training.batch_size", remedy=remedy))
    fewest = -(-share // (micro_batch_size or share))
    steps = next(n for n in range(fewest, share + 1) if share % n == 0)
    return share // steps, steps
