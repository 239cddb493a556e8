"""A phase's settings as transformers and torch take them: the optimizer, and the Trainer's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainingArguments

from loraf_train.trainer.master_weights import MasterAdamW
from loraf_train.trainer.order import split_batch

if TYPE_CHECKING:
    from loraf_train.trainer.phase import Phase


def optimizer_of(phase: Phase, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    settings = phase.settings
    if phase.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    if any(torch.promote_types(p.dtype, torch.float32) != p.dtype for p in parameters):
        return MasterAdamW(parameters, settings.learning_rate, settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def arguments_of(phase: Phase, folder: str, device: torch.device) -> TrainingArguments:
    settings = phase.settings
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
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one GPU: never torch's DataParallel
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = split_batch(
        settings.batch_size, settings.micro_batch_size, arguments.world_size
    )
    return arguments
