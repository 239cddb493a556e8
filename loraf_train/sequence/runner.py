"""A whole run: every task of a configuration, in order, into one checkpoint.

    for each task that the checkpoint does not have yet:
        calibrate   choose its K positions of each matrix
        adapt       train its K values there
        commit      its file, then the manifest

It may be killed at any moment and run again: what is finished stays, and the task that was being trained goes on where
it was (loraf_train.sequence.resume).

A task trains on top of what earlier tasks stored (`start: previous`, Algorithm 1) or on the bare model (`start: base`);
either way it never takes a position that another task owns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

import loraf
from loraf import base_model, manifest
from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, Problem
from loraf_train.adapter import masks, sharding
from loraf_train.adapter.host import Host, earlier, find_targets, projections, shapes_of
from loraf_train.processes import group, launcher
from loraf_train.sequence import provenance, resume
from loraf_train.sequence.calibrate import calibrate
from loraf_train.sequence.train_task import adapt
from loraf_train.trainer import loop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf_train.data.examples import TaskData
    from loraf_train.settings.config import RunConfig, TaskConfig

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase", Path]
Choose = Callable[..., dict[str, torch.Tensor]]  # as `calibrate`


class Observer:
    """What a run tells while it goes on. Every method does nothing; override those that matter.

    Of several processes the first is told. Where the base is divided over them (adapter.sharding), all are told
    everything but steps, since any use of the model takes all of them.
    """

    def task_kept(self, checkpoint: Checkpoint, task: TaskConfig) -> None:
        """The checkpoint already has this task; it is not trained again."""

    def task_started(self, task: TaskConfig) -> None: ...

    def remarked(self, task: TaskConfig, remark: str) -> None:
        """Something is to be said of what an interrupted run left of the task."""

    def resumed(self, task: TaskConfig, after: str) -> None:
        """The task goes on after this step; what came before is not told again."""

    def calibration_step(self, loss: float, step: int, total: int) -> None:
        """A mini-batch of calibration is done; `step` counts from 1."""

    def calibrated(self, task: TaskConfig) -> None:
        """The task's positions are chosen."""

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        """An optimizer step of the task's training is done; `step` counts from 1."""

    def adapted(self, task: TaskConfig, model: PreTrainedModel) -> None:
        """The values are trained and rounded; the model still has the adapter's layers in it."""

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        """The task is in the checkpoint. The model is the bare base; leave its weights as they are."""


def load_model(config: RunConfig) -> Loaded:
    """The base model (frozen, on the GPU if there is one), its tokenizer, and the folder that both are in.

    `precision: auto` is float32 on a CPU, and bfloat16 on a GPU that has it. Where the launcher asks for FSDP, the
    processes are joined and the model is divided over them.

    Raises:
        ConfigError: the model cannot be had, or its files are not a whole causal language model; the launcher asks for
            what is not supported.
    """
    refused = launcher.problems()
    if refused:
        raise ConfigError(refused)
    file = str(config.file)
    folder = base_model.resolve(config.model, config.revision, file)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    half = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        with _no_progress_bars():
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16 if half else torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers, tokenizers and safetensors have no exception in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"the model in {folder} cannot be loaded ({reason})"
        remedy = "use a causal language model that this transformers knows, with safetensors weights"
        raise ConfigError(Problem(message, "model", file, remedy)) from error
    if found["missing_keys"]:
        message = f"the weights in {folder} lack {', '.join(sorted(found['missing_keys'])[:3])}"
        raise ConfigError(Problem(message, "model", file, "use a complete causal language model"))
    model.eval().requires_grad_(False)
    how = launcher.sharding()
    if how is None:
        return model.to(device), tokenizer, folder
    group.join(device)  # only now: transformers would load nothing in all processes but the first
    sharding.shard(model, device, how)
    return model, tokenizer, folder


def run(
    config: RunConfig,
    data: Mapping[str, TaskData] | Callable[[TaskConfig], TaskData],
    observer: Observer | None = None,
    loaded: Loaded | None = None,
    choose: Choose = calibrate,
) -> Checkpoint:
    """Trains every task that `config.output` does not hold yet.

    Args:
        data: the tasks' data by name, or what gives it when a task's turn comes (never for tasks already trained).
        loaded: what `load_model` gave, if it is at hand.
        choose: how a task's positions are chosen; nothing of it is stored, so another one needs another output folder.

    Raises:
        ConfigError: before anything is trained, everything that speaks against the run: a checkpoint of another base,
            seed or shape, edited settings of a finished task, too few free positions for a task still to come.
        CheckpointError: the checkpoint in `config.output` cannot be used.
    """
    model, tokenizer, folder = loaded or load_model(config)
    targets = find_targets(model, config.adapter.target_modules, str(config.file))
    group.join(model.device)
    if observer is None or not (group.is_first() or sharding.is_sharded(model)):
        observer = Observer()
    checkpoint = Checkpoint.open(config.output) if (config.output / manifest.FILE_NAME).exists() else None
    group.wait()  # none may write before all have looked
    _require_possible(config, checkpoint, folder, shapes_of(targets))
    if checkpoint is None:
        checkpoint = group.first_writes(
            lambda: _create(config, folder, shapes_of(targets)), lambda: Checkpoint.open(config.output)
        )
    finished = checkpoint.manifest.task_names
    group.first_writes(lambda: resume.tidy(config.output, finished), lambda: None)
    host: Host | None = None
    for task in config.tasks:
        if task.name in checkpoint.manifest.task_names:
            observer.task_kept(checkpoint, task)
            continue
        if host is None:
            model.requires_grad_(False)
            host = Host(model, targets, projections(checkpoint, targets), pad_id(tokenizer), config.output)
        observer.task_started(task)
        given = data(task) if callable(data) else data[task.name]
        checkpoint = _train(host, config, task, given, checkpoint, observer, choose)
        witness = _witness(targets)
        observer.task_finished(checkpoint, task, model)
        if not torch.equal(witness, _witness(targets)):
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


def _require_possible(
    config: RunConfig, checkpoint: Checkpoint | None, folder: Path, shapes: Mapping[str, tuple[int, int]]
) -> None:
    file = str(config.file)
    found = checkpoint.manifest if checkpoint else None
    problems = provenance.conflicts(config, found, folder, shapes) if found else []
    if not problems:
        finished = found.task_names if found else ()
        wishes = [
            masks.Wish(task.name, task.sparsity, f"tasks[{i}].sparsity", file)
            for i, task in enumerate(config.tasks)
            if task.name not in finished
        ]
        problems = masks.shortage(shapes, config.adapter.rank, wishes, found)
    if problems:
        raise ConfigError(problems)


def _train(
    host: Host,
    config: RunConfig,
    task: TaskConfig,
    data: TaskData,
    checkpoint: Checkpoint,
    observer: Observer,
    choose: Choose,
) -> Checkpoint:
    """One task, from its data to its place in the checkpoint, which comes back with it."""
    before = checkpoint.manifest.task_names if task.start == "previous" else ()
    active = {module: earlier(checkpoint, before, module) for module in host.targets}
    taken = {module: [values[module] for values in checkpoint.tasks.values()] for module in host.targets}
    seeds = {phase: loop.derived_seed(config.seed, task.name, phase) for phase in ("calibration", "adaptation")}
    keeper = _keeper(host, config, task, data, checkpoint)
    for remark in keeper.notes:
        observer.remarked(task, remark)
    if keeper.state is not None:
        observer.resumed(task, str(keeper.state))
    chosen = keeper.state.masks if keeper.state is not None else None
    if chosen is None:
        chosen = choose(
            host,
            task,
            data.train,
            taken,
            active,
            seeds["calibration"],
            observer.calibration_step,
            keeper.journal(resume.CALIBRATION),
        )
        _require_agreement(task, chosen, host.model.device)
        keeper.chosen(chosen)
        observer.calibrated(task)
    values, outcome = adapt(
        host,
        task,
        data.train,
        chosen,
        active,
        seeds["adaptation"],
        getattr(torch, config.adapter.dtype),
        observer.step,
        lambda: observer.adapted(task, host.model),
        keeper.journal(resume.TRAINING),
    )
    making = {
        "settings": provenance.settings(config, task),
        "examples": len(data.train),
        "steps": outcome.steps,
        "loss": {"first": outcome.first_loss, "last": outcome.last_loss},
        "seeds": seeds,
        **surroundings(host.model),
    }

    def commit() -> Checkpoint:
        checkpoint.add_task(
            task.name,
            values,
            alpha=task.alpha,
            sparsity=task.sparsity,
            trained_with=before,
            templates=data.templates,
            training=making,
        )
        keeper.clear()
        return checkpoint

    return group.first_writes(commit, lambda: Checkpoint.open(config.output))


def _require_agreement(task: TaskConfig, chosen: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """All processes chose the same positions; otherwise each would train its own, and the mean of them is nothing."""
    digest = hashlib.sha256()
    for flat in chosen.values():
        digest.update(flat.numpy().tobytes())
    if not group.agree(int(digest.hexdigest()[:15], 16), device):
        message = f"task {task.name!r}: the processes of this run chose different positions"
        raise ConfigError(Problem(message, remedy="run it on processors of one kind, or in one process"))


def _keeper(host: Host, config: RunConfig, task: TaskConfig, data: TaskData, checkpoint: Checkpoint) -> resume.Keeper:
    """What keeps the task's state, with all that its values depend on. Of the data only what is trained on counts."""
    settings = {name: part for name, part in provenance.settings(config, task).items() if name != "data"}
    around = surroundings(host.model)
    making = {
        "settings": settings,
        "examples": resume.digest_of(data.train),
        "earlier": checkpoint.manifest.adapter_digest,
        "base": checkpoint.manifest.base_model.fingerprint,
        "precision": around["precision"],
        "versions": around["versions"],
    }
    where = {
        "device": around["device"],
        "processes": around["processes"],
        "micro_batch_size": task.training.micro_batch_size,
        "gradient_checkpointing": task.training.gradient_checkpointing,
        "packing": task.training.packing,
    }
    return resume.Keeper(config.output, task.name, making, where, task.training.save_seconds, host.model.device)


def surroundings(model: PreTrainedModel) -> dict[str, Any]:
    """Precision, device, processes and versions: what the last bits of a result depend on beside the settings."""
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "processes": group.count(),
        "versions": {
            "loraf": loraf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do where attention and loss pass over it."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _witness(targets: Mapping[str, nn.Linear]) -> torch.Tensor:
    """The first column of every target weight: B·A changes it in every row where B has an entry."""
    return torch.cat([sharding.local(module.weight.detach())[:, 0].float() for module in targets.values()])


class _no_progress_bars:
    """transformers' bars off within; they are global to the process."""

    def __enter__(self) -> None:
        self._were_on = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *exc) -> None:
        if self._were_on:
            transformers.utils.logging.enable_progress_bar()
