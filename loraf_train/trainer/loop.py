"""Runs one phase on transformers' Trainer: from examples to updated parameters, without writing to disk.

Calibration and training are each such a phase. Everything random is a function of the phase's seed and of counters: the
order of examples depends on the epoch; dropout on the step, the example and the place of a token in it. So a phase
resumed from a Snapshot after any step continues as if it had never stopped, and neither micro-batches nor the number of
processes change what is drawn.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from loraf.errors import ConfigError, Problem
from loraf_train.adapter import model_limits, quantised, sharding
from loraf_train.adapter.dropout import TokenKeys
from loraf_train.data.examples import IGNORED
from loraf_train.data.preferences import Pair
from loraf_train.data.stream import DrawnExamples, ExampleStream, Limits
from loraf_train.processes import launcher
from loraf_train.trainer import batches, trackers
from loraf_train.trainer.arguments import arguments_of, optimizer_of
from loraf_train.trainer.order import BlankPadded, EpochOrder, GivenOrder, derived_seed
from loraf_train.trainer.packing import PackingCollator, require_separate
from loraf_train.trainer.penalty import NO_PENALTY, Penalty
from loraf_train.trainer.phase import NO_JOURNAL as NO_JOURNAL
from loraf_train.trainer.phase import Journal as Journal
from loraf_train.trainer.phase import OnStep as OnStep
from loraf_train.trainer.phase import Outcome as Outcome
from loraf_train.trainer.phase import Phase as Phase
from loraf_train.trainer.phase import Snapshot as Snapshot
from loraf_train.trainer.randomness import drawn_by_token
from loraf_train.trainer.stopping import Stopping

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from loraf_train.data.examples import Example

_STREAMED = "stream.digest"  # a tensor of a Snapshot
_PENALTY, _STOPPING = "penalty", "stopping"  # prefixes of their tensors in a Snapshot


def completion_loss(
    outputs: CausalLMOutputWithPast,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Returns the sum of cross entropies at the labelled tokens, divided by their number in the whole step.

    Equals transformers' own loss, but widens to float32 only the rows that have a label.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    assert outputs.logits is not None
    logits = outputs.logits[:, :-1][labelled]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(logits, targets[labelled], reduction="sum")
    return total / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example] | Sequence[Pair],
    phase: Phase,
    pad_id: int,
    on_step: OnStep,
    journal: Journal = NO_JOURNAL,
    penalty: Penalty = NO_PENALTY,
    stopping: Stopping | None = None,
) -> Outcome:
    """Trains the model's trainable parameters with a fresh optimizer, or resumes from `journal.start`.

    Args:
        examples: preferences if the phase has a beta.
        penalty: of the parameters, which is added to the loss.
        stopping: ends the phase early, and leaves the best parameters; None: all steps are done, the last ones stay.

    Raises:
        ConfigError: the batch size is not a multiple of the number of processes, there are no examples, the model
            cannot take packed rows, or the loss is not finite.
    """
    settings = phase.settings
    streamed: DrawnExamples | None = None
    if isinstance(examples, ExampleStream):
        assert settings.max_steps is not None  # settings.objections
        examples = streamed = examples.drawn(
            phase.seed, settings.max_steps * settings.batch_size, settings.batch_size, limits_of(model)
        )
    if not examples:
        raise ConfigError(Problem(f"{phase.name}: there are no examples to train on", remedy="add training records"))
    use_cache = getattr(model.config, "use_cache", None)  # a multimodal model has it in the config of its text part
    collator: batches.Collator | PackingCollator = batches.Collator(pad_id)
    trainer_class: type[_Trainer] = _Trainer
    collate: Any = None
    blank: Any = None
    if phase.beta is not None:
        from loraf_train.trainer import preference  # imports TRL, an extra

        trainer_class = preference.trainer_class(_Trainer, phase.beta)
        collate, blank = preference.PairCollator(pad_id), preference.blank(pad_id)
    elif settings.packing:
        require_separate(model)
        collator = PackingCollator(pad_id, settings.max_length)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(phase, list(parameters.values()))
    start = journal.start
    if start is not None:
        _restore_parameters(parameters, start)
        penalty.restore(start.part(_PENALTY))
        if streamed is not None and _STREAMED in start.tensors:
            streamed.expect(start.step * settings.batch_size, bytes(start.tensors[_STREAMED].tolist()))
        if stopping is not None:
            stopping.restore(start.part(_STOPPING))
        if start.step == start.steps or (stopping is not None and stopping.is_over):
            if stopping is not None:
                stopping.keep_best(parameters)
            return Outcome(start.step, start.first_loss, start.last_loss)
    sharding.leave_to_fsdp(model)
    try:
        with (
            launcher.plain_data_parallel(),
            _scratch_folder() as folder,
            drawn_by_token(model, phase.seed) if journal.dropout_by_token else nullcontext() as tokens,
            trackers.opened(phase.tracking) as callbacks,
            nullcontext() if phase.beta is None else preference.log_probability_head(model),
        ):
            with quantised.with_adapter(model):
                trainer = trainer_class(
                    model=model,
                    args=arguments_of(phase, folder, model.device),
                    train_dataset=BlankPadded(examples, pad_id, in_order=streamed is not None, blank=blank),
                    data_collator=collate or batches.NumberedCollator(collator),
                    compute_loss_func=completion_loss,
                    optimizers=(optimizer, None),
                )
            report = _Report(phase, on_step, journal, parameters, optimizer, penalty, stopping, streamed)
            report.steps_of_epoch = -(-len(examples) // settings.batch_size)
            report.log = trainer.log
            trainer.tokens = tokens
            trainer.remove_callback(PrinterCallback)
            for callback in (report, _AddsPenalty(penalty), *callbacks):
                trainer.add_callback(callback)
            trainer.train_from(start, parameters, optimizer)
        if stopping is not None:
            stopping.keep_best(parameters)
    finally:
        # Undo what Trainer and accelerate leave behind: a config without a cache, training mode, and global state.
        if use_cache is not None:
            model.config.use_cache = use_cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        model.train(False)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]  # of transformers
            # a hook on the embedding that enabling it installed
            model.disable_input_require_grads()  # type: ignore[no-untyped-call]  # of transformers
        optimizer.zero_grad()
        optimizer.state.clear()
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
    return Outcome(report.steps, report.first_loss, report.last_loss)


def limits_of(model: PreTrainedModel) -> Limits:
    """Returns what the model can read."""
    return Limits(model_limits.vocabulary(model), model_limits.positions(model))


class _Trainer(transformers.Trainer):
    """transformers' Trainer with this project's order of examples, resuming from a Snapshot instead of a folder.

    transformers' `checkpoint-N` folders are pickles, and a crash may leave half of one. The Trainer's own bookkeeping
    for resuming (epoch, batches to skip, accumulation) is used; what it would load from files is put in place here.

    Attributes:
        tokens: where the adapter's layers read which tokens they compute; None: they do not ask.
    """

    tokens: TokenKeys | None = None
    _restore: Callable[[], None]
    _steps_done: int
    _order: EpochOrder

    def train_from(
        self, start: Snapshot | None, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Trains to the end, from the beginning or from `start`."""
        if start is None:
            self.train()
            return
        self._restore = lambda: _restore_optimizer(parameters, optimizer, start)
        self._steps_done = start.step
        folder = self.args.output_dir
        assert folder is not None
        state = TrainerState(global_step=start.step, train_batch_size=self.args.per_device_train_batch_size)
        state.compute_steps(self.args, start.steps)  # type: ignore[no-untyped-call]  # of transformers
        try:
            state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
        except OSError as error:
            raise _no_temporary_files(error) from error
        self.train(resume_from_checkpoint=folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """No-op: `fit` has restored the parameters already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._restore()
        assert self.lr_scheduler is not None
        with warnings.catch_warnings():  # torch warns when a scheduler steps before its optimizer
            warnings.simplefilter("ignore")
            for _ in range(self._steps_done):  # the learning rate is a function of the step alone
                self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """No-op: each step seeds its own generators."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate sets the sampler's epoch too, but in several processes not through its wrapper that skips batches.
        self._order.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # of transformers

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset[Example] | None = None) -> EpochOrder:
        several = self.args.world_size > 1
        multiple = self.args.world_size * self.args.per_device_train_batch_size if several else 1
        assert isinstance(self.train_dataset, BlankPadded)
        if self.train_dataset.in_order:
            self._order = GivenOrder(len(self.train_dataset), self.args.seed)
            return self._order
        self._order = EpochOrder(len(self.train_dataset), self.args.seed, multiple)
        return self._order

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        examples, places = inputs.pop(batches.EXAMPLES), inputs.pop(batches.PLACES)
        if self.tokens is not None:
            self.tokens.set(self.state.global_step, examples, places)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        return 0  # an unused estimate; counting parameters at every step takes longer than a small step


class _Report(TrainerCallback):
    """Seeds each step, reports its loss, ends the phase early or at a loss that is not finite, and offers snapshots.

    Attributes:
        steps_of_epoch: optimizer steps of an epoch, the last, smaller one counted.
        log: logs values as the Trainer does, so that trackers receive them.
    """

    steps_of_epoch: int
    log: Callable[[dict[str, float]], None]

    def __init__(
        self,
        phase: Phase,
        on_step: OnStep,
        journal: Journal,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        penalty: Penalty,
        stopping: Stopping | None,
        streamed: DrawnExamples | None,
    ):
        self._phase = phase
        self._stopping = stopping
        self._streamed = streamed
        self._penalty = penalty
        self._on_step = on_step
        self._journal = journal
        self._parameters = parameters
        self._optimizer = optimizer
        start = journal.start
        self.steps = start.step if start else 0
        self.first_loss = start.first_loss if start else math.nan
        self.last_loss = start.last_loss if start else math.nan

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(derived_seed("step", self._phase.seed, state.global_step, args.process_index))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end
        loss = logs["loss"]
        if not math.isfinite(loss):
            message = f"{self._phase.name}: the loss is {loss} at step {state.global_step}"
            remedy = f"use a learning rate below {self._phase.settings.learning_rate:g}, or more warm-up steps"
            remedy += "" if self._phase.beta is None else f", or a beta below {self._phase.beta:g}"
            raise ConfigError(Problem(message, remedy=remedy))
        self.first_loss = loss if self.steps == 0 else self.first_loss
        self.last_loss = loss
        self.steps = state.global_step

        def snapshot() -> Snapshot:
            tensors = _tensors(self._parameters, self._optimizer)
            tensors |= {f"{_PENALTY}.{key}": tensor for key, tensor in self._penalty.state().items()}
            if self._stopping is not None:
                of_stopping = self._stopping.state().items()
                tensors |= {f"{_STOPPING}.{key}": tensor.cpu().contiguous() for key, tensor in of_stopping}
            digest = self._digest_of_stream()
            tensors |= {_STREAMED: torch.tensor(list(digest), dtype=torch.uint8)} if digest else {}
            return Snapshot(self.steps, state.max_steps, self.first_loss, self.last_loss, tensors)

        if state.is_world_process_zero:
            self._on_step(loss, logs["learning_rate"], state.global_step, state.max_steps)
        is_last = state.global_step == state.max_steps
        if self._stopping is not None and self._evaluate(self._stopping, state):
            control.should_training_stop = is_last = True
        self._journal.after_step(self.steps, self.steps if is_last else state.max_steps, snapshot)

    def _digest_of_stream(self) -> bytes:
        """Digest of the streamed examples so far; empty: none are, or this process has not read that far yet."""
        if self._streamed is None:
            return b""
        return self._streamed.digests.get(self.steps * self._phase.settings.batch_size, b"")

    def _evaluate(self, stopping: Stopping, state: TrainerState) -> bool:
        """Evaluates if it is time to. Returns whether the phase is over."""
        if not stopping.is_due(state.global_step, state.max_steps, self.steps_of_epoch):
            return False
        self.log({"eval_loss": stopping.evaluate(state.global_step, self._parameters, self._penalty.accepts())})
        return stopping.is_over


class _AddsPenalty(TrainerCallback):
    """Adds the gradient of the penalty to that of the loss, which the Trainer has clipped by now."""

    def __init__(self, penalty: Penalty):
        self._penalty = penalty

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._penalty.add_gradient(state.global_step, state.max_steps)


def _tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Snapshot.tensors of the current step, without those of the penalty."""
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in optimizer.state[p].items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _restore_parameters(parameters: Mapping[str, nn.Parameter], start: Snapshot) -> None:
    stored = start.part("parameter")
    for name, p in parameters.items():
        p.copy_(stored[name])


def _restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, start: Snapshot
) -> None:
    for key_and_name, tensor in start.part("optimizer").items():
        key, _, name = key_and_name.partition(".")
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """A temporary folder, which the Trainer requires; all it ever holds is the trainer state of a resumed phase."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _no_temporary_files(error) from error
    with folder as path:
        yield path


def _no_temporary_files(error: OSError) -> ConfigError:
    remedy = "free some disk space or set the environment variable TMPDIR to another folder, and run the command again"
    return ConfigError(Problem(f"temporary files cannot be written ({error})", remedy=remedy))
