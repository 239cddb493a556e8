"""Runs a configuration: trains its tasks in order into one checkpoint.

    for each task that the checkpoint does not have yet:
        calibrate   select its K positions of each matrix
        train       train its K values there
        commit      write its file, then the manifest

A run may be killed at any moment and started again: finished tasks stay, and the task in progress resumes where it was
(loraf_train.sequence.resume).

A task trains on top of the stored earlier tasks (`start: previous`, Algorithm 1) or on the base model alone
(`start: base`). Either way it never takes a position that another task owns.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraf import base_model, manifest
from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, Problem
from loraf.files.folder_lock import locked
from loraf_train.adapter import model_limits, sharding
from loraf_train.adapter.trainable_base import TrainableBase, earlier_tasks, find_targets, projections, shapes_of
from loraf_train.adapter.weights import is_quantised
from loraf_train.processes import group
from loraf_train.retention.of_base import ProtectedBase, protected_base
from loraf_train.retention.of_checkpoint import protected_tasks, unprotected
from loraf_train.retention.of_task import RetentionOfTask
from loraf_train.sequence import provenance, resume
from loraf_train.sequence.calibrate import calibrate, read_by_calibration, require_read
from loraf_train.sequence.conflicts import obstacles
from loraf_train.sequence.load_base import Loaded as Loaded
from loraf_train.sequence.load_base import load_model as load_model
from loraf_train.sequence.phases import CALIBRATION, CALIBRATION_SEED, TRAINING, TRAINING_SEED, seeds_of
from loraf_train.sequence.state_check import TaskShape
from loraf_train.sequence.stop_early import evaluations_of, stopping_of
from loraf_train.sequence.train_task import train_task
from loraf_train.trainer.randomness import own_randomness

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import Example
    from loraf_train.data.task_data import TaskData
    from loraf_train.retention.protection import ProtectedTask
    from loraf_train.settings.config import RunConfig, TaskConfig

SelectPositions = Callable[..., dict[str, torch.Tensor]]  # with the signature of `calibrate`


class Observer:
    """Progress of a run. Every method is a no-op; override those you need.

    With several processes only the first one's observer is called. If the base is sharded (adapter.sharding), every
    method but the two steps is called in all processes, since any use of the model needs all of them.
    """

    def task_kept(self, checkpoint: Checkpoint, task: TaskConfig) -> None:
        """The checkpoint already has this task; it is not trained again."""

    def task_started(self, task: TaskConfig) -> None: ...

    def remarked(self, task: TaskConfig, remark: str) -> None:
        """A remark for the user on the saved state of an interrupted run."""

    def resumed(self, task: TaskConfig, after: str) -> None:
        """The task resumes after this step; earlier steps are not reported again."""

    def calibration_step(self, loss: float, step: int, total: int) -> None:
        """A mini-batch of calibration is done; `step` counts from 1."""

    def calibrated(self, task: TaskConfig) -> None:
        """The task's positions are selected."""

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        """An optimizer step of the task's training is done; `step` counts from 1."""

    def evaluated(self, task: TaskConfig, loss: float, step: int, best: bool) -> None:
        """The task in training was evaluated for early stopping; `best`: this is its smallest loss so far."""

    def retained(self, task: TaskConfig, spent: Mapping[str, float], budget: float) -> None:
        """The task was trained under retention.

        Args:
            spent: earlier task → root mean square change of its logits by all later tasks, as its statistics predict;
                for the base model `of_base.NAME`.
        """

    def unprotected(self, tasks: Sequence[str]) -> None:
        """Retention is on, but these finished tasks have no statistics; later ones may change what they answer."""

    def trained(self, task: TaskConfig, model: PreTrainedModel) -> None:
        """The values are trained and rounded; the adapter's layers are still in the model."""

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        """The task is in the checkpoint. The model is the bare base; restore its weights if you change them."""


def run(
    config: RunConfig,
    data: Mapping[str, TaskData] | Callable[[TaskConfig], TaskData],
    observer: Observer | None = None,
    loaded: Loaded | None = None,
    select_positions: SelectPositions = calibrate,
    base_text: Sequence[Example] | None = None,
) -> Checkpoint:
    """Trains every task that `config.output` does not have yet.

    Args:
        data: the tasks' data by name, or a function that loads a task's data when its turn comes (not called for
            finished tasks).
        loaded: result of `load_model`; None: load it here.
        select_positions: replaces calibration. The checkpoint does not record it, so use another output folder.
        base_text: the general text that `retention.base` names; None: it is read here.

    Raises:
        ConfigError: all obstacles to the run, before anything is trained: see `conflicts.obstacles`, `protected_base`.
        CheckpointError: the checkpoint in `config.output` cannot be read or written, or another process writes to it.
    """
    loaded = loaded or load_model(config)
    with locked(config.output, "loraf-train run") if group.is_first() else contextlib.nullcontext():
        return _run(config, data, observer, loaded, select_positions, base_text)


def _run(
    config: RunConfig,
    data: Mapping[str, TaskData] | Callable[[TaskConfig], TaskData],
    observer: Observer | None,
    loaded: Loaded,
    select_positions: SelectPositions,
    base_text: Sequence[Example] | None,
) -> Checkpoint:
    model, tokenizer, folder = loaded
    targets = find_targets(model, config.adapter.target_modules, str(config.file))
    group.join(model.device)
    if observer is None or not (group.is_first() or sharding.is_sharded(model)):
        observer = Observer()
    checkpoint = Checkpoint.open(config.output) if (config.output / manifest.FILE_NAME).exists() else None
    group.wait()  # no process may write before all have looked
    problems = obstacles(config, folder, shapes_of(targets), checkpoint.manifest if checkpoint else None)
    if problems:
        raise ConfigError(problems)
    if checkpoint is None:
        checkpoint = group.first_writes(
            lambda: _create(config, folder, shapes_of(targets)), lambda: Checkpoint.open(config.output)
        )
    finished = checkpoint.manifest.task_names
    group.first_writes(lambda: resume.tidy(config.output, finished), lambda: None)
    base: TrainableBase | None = None
    of_base: ProtectedBase | None = None
    for task in config.tasks:
        if task.name in checkpoint.manifest.task_names:
            observer.task_kept(checkpoint, task)
            continue
        if base is None:
            if config.retention is not None and unprotected(checkpoint):
                observer.unprotected(unprotected(checkpoint))
            model.requires_grad_(False)
            pad_id = model_limits.padding_id(tokenizer, model_limits.vocabulary(model))
            base = TrainableBase(model, targets, projections(checkpoint, targets), pad_id, config.output)
            of_base = protected_base(base, tokenizer, config, base_text)
        observer.task_started(task)
        task_data = data(task) if callable(data) else data[task.name]
        checkpoint = _add_task(base, config, task, task_data, checkpoint, observer, select_positions, of_base)
        before = _weight_sample(targets)
        observer.task_finished(checkpoint, task, model)
        if not torch.equal(before, _weight_sample(targets)):
            raise RuntimeError("Observer.task_finished left a task merged into the base model's weights")
    return checkpoint


def _create(config: RunConfig, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Checkpoint:
    return Checkpoint.create(
        config.output,
        base_model.describe(config.model, folder, config.revision),
        config.adapter.rank,
        shapes,
        config.seed,
        config.adapter.init_std,
    )


def _add_task(
    base: TrainableBase,
    config: RunConfig,
    task: TaskConfig,
    data: TaskData,
    checkpoint: Checkpoint,
    observer: Observer,
    select_positions: SelectPositions,
    of_base: ProtectedBase | None,
) -> Checkpoint:
    """Takes a task through both phases and commits it; returns the checkpoint that has it."""
    trained_with = checkpoint.manifest.task_names if task.start == "previous" else ()
    earlier = {module: earlier_tasks(checkpoint, trained_with, module) for module in base.targets}
    taken = {module: [values[module] for values in checkpoint.tasks.values()] for module in base.targets}
    seeds = seeds_of(config.seed, task.name)
    _require_one_date(task, data, base.model.device)
    protected = [] if of_base is None else [of_base.as_task(checkpoint)]
    protected += protected_tasks(checkpoint) if config.retention is not None else []
    store = _resume_store(base, config, task, data, checkpoint, protected, of_base)
    for remark in store.remarks:
        observer.remarked(task, remark)
    if store.state is not None:
        observer.resumed(task, str(store.state))
    retention = RetentionOfTask(config.retention, protected if store.retention else ())

    positions = store.state.positions if store.state is not None else None
    if store.state is None or positions is None:
        positions = select_positions(
            base,
            task,
            data.units,
            taken,
            earlier,
            seeds[CALIBRATION_SEED],
            observer.calibration_step,
            store.journal(CALIBRATION),
            retention.penalty,
        )
        _require_agreement(task, positions, base.model.device)
        store.save_positions(positions, read_by_calibration(base.model, task, data.train, seeds[CALIBRATION_SEED]))
        observer.calibrated(task)
    else:
        require_read(base.model, task, data.train, seeds[CALIBRATION_SEED], store.state.calibrated_on)

    def on_trained() -> None:
        if retention.spent:
            observer.retained(task, retention.spent, retention.budget)
        retention.gather(base, data.train, seeds[TRAINING_SEED], task.training.micro_batch_size)
        if retention.failure:
            remark = (
                f"its statistics could not be gathered ({retention.failure}), so later tasks may change its answers"
            )
            observer.remarked(task, remark)
        observer.trained(task, base.model)

    stopping = stopping_of(base.model, task, data, observer.evaluated)
    values, outcome = train_task(
        base,
        task,
        data.units,
        positions,
        earlier,
        seeds[TRAINING_SEED],
        getattr(torch, config.adapter.dtype),
        observer.step,
        on_trained,
        store.journal(TRAINING),
        penalty=retention.penalty,
        stopping=stopping,
    )
    training_record = {
        "settings": provenance.settings(config, task),
        "examples": outcome.steps * task.training.batch_size if task.data.streaming else len(data.train),
        provenance.EXAMPLES_DIGEST: data.digest,
        **({resume.DATE: data.date} if data.date else {}),
        "steps": outcome.steps,
        "loss": {"first": outcome.first_loss, "last": outcome.last_loss},
        "seeds": seeds,
        **({"early_stopping": stopping.record} if stopping else {}),
        **({"retention": retention.record} if retention.record else {}),
        **provenance.environment(base.model),
    }

    def commit() -> Checkpoint:
        checkpoint.add_task(
            task.name,
            values,
            alpha=task.alpha,
            sparsity=task.sparsity,
            trained_with=trained_with,
            templates=data.templates,
            training=training_record,
            statistics=retention.statistics,
        )
        store.clear()
        return checkpoint

    return group.first_writes(commit, lambda: Checkpoint.open(config.output))


def _require_one_date(task: TaskConfig, data: TaskData, device: torch.device) -> None:
    """Raises ConfigError if processes that were started about midnight wrote different dates into their prompts."""
    if data.date and not group.agree(date.fromisoformat(data.date).toordinal(), device):
        message = (
            f"task {task.name!r}: the processes of this run began on different days, and its prompts name the date"
        )
        raise ConfigError(Problem(message, remedy="start the run again"))


def _require_agreement(task: TaskConfig, positions: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Raises ConfigError if processes selected different positions: averaging their gradients would be meaningless."""
    digest = hashlib.sha256()
    for of_module in positions.values():
        digest.update(of_module.numpy().tobytes())
    if not group.agree(int(digest.hexdigest()[:15], 16), device):
        message = f"task {task.name!r}: the processes of this run selected different positions"
        raise ConfigError(Problem(message, remedy="run it on processors of one kind, or in one process"))


def _resume_store(
    base: TrainableBase,
    config: RunConfig,
    task: TaskConfig,
    data: TaskData,
    checkpoint: Checkpoint,
    protected: Sequence[ProtectedTask],
    of_base: ProtectedBase | None,
) -> resume.ResumeStore:
    """The store for a task's unfinished state. Of the data only the training examples matter."""
    retention: dict[str, Any] = {}
    if config.retention is not None and protected:
        statistics = {t.name: t.statistics.sha256 for t in checkpoint.manifest.tasks if t.statistics is not None}
        retention = {resume.RETENTION: {"budget": config.retention.budget, "statistics": statistics}}
    if of_base is not None:
        retention[resume.GENERAL] = of_base.text
    settings = {name: part for name, part in provenance.settings(config, task).items() if name != "data"}
    environment = provenance.environment(base.model)
    return resume.ResumeStore(
        config.output,
        task.name,
        provenance={
            "settings": settings,
            "examples": data.digest,
            "earlier": checkpoint.manifest.adapter_digest,
            "base": checkpoint.manifest.base_model.fingerprint,
            "precision": environment["precision"],
            "versions": environment["versions"],
            **({resume.DATE: data.date} if data.date else {}),
            **retention,
            **evaluations_of(task, data),
            **({resume.DROPOUT: resume.BY_TOKEN} if task.training.dropout or own_randomness(base.model) else {}),
        },
        environment={
            "device": environment["device"],
            "processes": environment["processes"],
            "micro_batch_size": task.training.micro_batch_size,
            "gradient_checkpointing": task.training.gradient_checkpointing,
            "packing": task.training.packing,
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
        },
        seconds=task.training.save_seconds,
        device=base.model.device,
        misfit=_task_shape(base, task, data, checkpoint, len(protected)).misfit,
    )


def _task_shape(
    base: TrainableBase, task: TaskConfig, data: TaskData, checkpoint: Checkpoint, protected: int
) -> TaskShape:
    shapes = {module: (linear.out_features, base.rank) for module, linear in base.targets.items()}
    taken = {module: [values[module] for values in checkpoint.tasks.values()] for module in shapes}
    return TaskShape(task, shapes, taken, len(data.train), protected)


def _weight_sample(targets: Mapping[str, nn.Linear]) -> torch.Tensor:
    """The first column of every target weight: merging B·A changes it in every row in which B has an entry.

    Weights in four bits are left out: nothing is merged into them.
    """
    plain = [linear for linear in targets.values() if not is_quantised(linear)]
    return torch.cat([torch.empty(0), *(sharding.local(x.weight.detach())[:, 0].float().cpu() for x in plain)])
