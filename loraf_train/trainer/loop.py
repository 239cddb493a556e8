"""One phase of training on transformers' Trainer: from examples to updated parameters, and nothing written to disk.

Calibration and adaptation are both such a phase. What depends on chance is a function of the phase's seed and of a
number: the order of the examples of the epoch, torch's own generators (dropout) of the step and the process. So a phase
can go on after any step, with a Snapshot of it, as if it had never stopped.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from loraf.errors import ConfigError, Problem
from loraf_train.adapter import sharding
from loraf_train.data.examples import IGNORED
from loraf_train.processes import launcher
from loraf_train.trainer import trackers
from loraf_train.trainer.order import Filled, Order, derived_seed, split_batch
from loraf_train.trainer.packing import PackingCollator, require_separate

if TYPE_CHECKING:
    from loraf_train.data.examples import Example

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
        packed_length: tokens of a row that several examples share (loraf_train.trainer.packing); None: a row for each.
        tracking: trackers that are told of each step.
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
    packed_length: int | None = None
    tracking: trackers.Tracking | None = None


@dataclass(frozen=True)
class Outcome:
    """What a phase did. Losses are means over completion tokens; `first_loss` is that of the first step."""

    steps: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Snapshot:
    """A phase between two optimizer steps: with the Phase and the examples, all that the rest of it depends on.

    Attributes:
        step: optimizer steps that are done.
        steps: of the whole phase.
        tensors: `parameter.<name>` and `optimizer.<what>.<name>` of each trainable parameter, on the CPU.
    """

    step: int
    steps: int
    first_loss: float
    last_loss: float
    tensors: dict[str, torch.Tensor]


class Journal:
    """Where a phase begins, and what is kept of it. This one begins at the beginning and keeps nothing."""

    start: Snapshot | None = None

    def after_step(self, step: int, steps: int, snapshot: Callable[[], Snapshot]) -> None:
        """Called in every process after each step; `snapshot` takes one, if it is wanted."""


NO_JOURNAL = Journal()


@dataclass(frozen=True)
class Collator:
    """Examples to a batch padded on the right. Loss only on completions; position 0 is predicted from nothing."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, each (examples, longest) int64."""
        longest = max(len(e.input_ids) for e in examples)
        ids = [e.input_ids + [self.pad_id] * (longest - len(e.input_ids)) for e in examples]
        real = [[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]
        labels = [e.labels() + [IGNORED] * (longest - len(e.input_ids)) for e in examples]
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


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example],
    phase: Phase,
    pad_id: int,
    on_step: OnStep,
    journal: Journal = NO_JOURNAL,
) -> Outcome:
    """Trains the model's trainable parameters with a fresh optimizer, or goes on where `journal` says.

    Raises:
        ConfigError: the batch does not divide over the processes, there are no examples, or the loss is not finite.
    """
    if not examples:
        raise ConfigError(Problem(f"{phase.name}: there are no examples to train on", remedy="give it records"))
    use_cache = model.config.use_cache
    collator = Collator(pad_id)
    if phase.packed_length is not None:
        require_separate(model)
        collator = PackingCollator(pad_id, phase.packed_length)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(phase, list(parameters.values()))
    start = journal.start
    if start is not None:
        _restore_parameters(parameters, start)
        if start.step == start.steps:
            return Outcome(start.step, start.first_loss, start.last_loss)
    sharding.leave_to_fsdp(model)
    try:
        with (
            launcher.plain_data_parallel(),
            _scratch_folder() as folder,
            trackers.opened(phase.tracking) as callbacks,
        ):
            trainer = _Trainer(
                model=model,
                args=_arguments(phase, folder, model.device),
                train_dataset=Filled(examples, pad_id),
                data_collator=collator,
                compute_loss_func=completion_loss,
                optimizers=(optimizer, None),
            )
            report = _Report(phase, on_step, journal, parameters, optimizer)
            trainer.remove_callback(PrinterCallback)
            for callback in (report, *callbacks):
                trainer.add_callback(callback)
            trainer.train_from(start, parameters, optimizer)
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
    """Trainer with this project's order of examples, which goes on from a Snapshot instead of a folder.

    transformers' own `checkpoint-N` folders are pickles, and a crash may leave half of one. What the Trainer does to go
    on (the epoch, the batches of it that are done, accumulation) is used; what it would load is put there.
    """

    def train_from(
        self, start: Snapshot | None, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        if start is None:
            self.train()
            return
        self._restore = lambda: _restore_optimizer(parameters, optimizer, start)
        self._steps_done = start.step
        state = TrainerState(global_step=start.step, train_batch_size=self.args.per_device_train_batch_size)
        state.compute_steps(self.args, start.steps)
        try:
            state.save_to_json(str(Path(self.args.output_dir) / TRAINER_STATE_NAME))
        except OSError as error:
            raise _no_temporary_files(error) from error
        self.train(resume_from_checkpoint=self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """The parameters are there already."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        self._restore()
        with warnings.catch_warnings():  # of a schedule that runs ahead of its optimizer
            warnings.simplefilter("ignore")
            for _ in range(self._steps_done):  # the learning rate is a function of the step alone
                self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint) -> None:
        """Each step seeds its own."""

    def _run_epoch(self, *arguments, epoch: int, **keywords):
        # accelerate tells the sampler itself, but not through what skips batches on several processes.
        self._order.set_epoch(epoch)
        return super()._run_epoch(*arguments, epoch=epoch, **keywords)

    def _get_train_sampler(self, train_dataset=None) -> Order:
        several = self.args.world_size > 1
        multiple = self.args.world_size * self.args.per_device_train_batch_size if several else 1
        self._order = Order(len(self.train_dataset), self.args.seed, multiple)
        return self._order

    def floating_point_ops(self, inputs) -> int:
        return 0  # an estimate that nobody reads; counting parameters at every step takes longer than a small step


class _Report(TrainerCallback):
    """Seeds each step, hands its loss on, stops at one that is not finite, and offers the journal a snapshot."""

    def __init__(
        self,
        phase: Phase,
        on_step: OnStep,
        journal: Journal,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ):
        self._phase = phase
        self._on_step = on_step
        self._journal = journal
        self._parameters = parameters
        self._optimizer = optimizer
        start = journal.start
        self.steps = start.step if start else 0
        self.first_loss = start.first_loss if start else math.nan
        self.last_loss = start.last_loss if start else math.nan

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        torch.manual_seed(derived_seed("step", self._phase.seed, state.global_step, args.process_index))

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

        def snapshot() -> Snapshot:
            tensors = _tensors(self._parameters, self._optimizer)
            return Snapshot(self.steps, state.max_steps, self.first_loss, self.last_loss, tensors)

        if state.is_world_process_zero:
            self._on_step(loss, logs["learning_rate"], state.global_step, state.max_steps)
        self._journal.after_step(self.steps, state.max_steps, snapshot)


def _tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What Snapshot.tensors holds."""
    found = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        found |= {f"optimizer.{what}.{name}": tensor for what, tensor in optimizer.state[p].items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def _restore_parameters(parameters: Mapping[str, nn.Parameter], start: Snapshot) -> None:
    for name, p in parameters.items():
        p.copy_(start.tensors[f"parameter.{name}"])


def _restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, start: Snapshot
) -> None:
    for key, tensor in start.tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            what, _, name = rest.partition(".")
            optimizer.state[parameters[name]][what] = tensor.clone()
    optimizer.load_state_dict(optimizer.state_dict())  # to the parameters' devices


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """For what the Trainer insists on; only a few lines about a step to go on from are ever written there."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _no_temporary_files(error) from error
    with folder as path:
        yield path


def _no_temporary_files(error: OSError) -> ConfigError:
    remedy = "make room on the disk, or name another folder in the environment variable TMPDIR; run the command again"
    return ConfigError(Problem(f"temporary files cannot be written ({error})", remedy=remedy))


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
