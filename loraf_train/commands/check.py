"""`loraf-train check`: reads everything that a run needs and reports every mistake at once; trains nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import ConfigError
from loraf.manifest import positions_per_matrix
from loraf.units import size_text
from loraf_train.data.examples import IGNORED, Example
from loraf_train.data.task_data import TaskData
from loraf_train.retention import base_text
from loraf_train.retention.extent import EXAMPLES, ROUNDS, stored_bytes
from loraf_train.sequence.base_checks import BaseModelShape
from loraf_train.sequence.preflight import PreparedRun, survey
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

_FOUR_BITS = 0.516  # bytes of a weight with its share of the scales, quantised again
LOSS_BEGINS, LOSS_ENDS = "⟦", "⟧"


def check(path: Path, overrides: Sequence[str]) -> int:
    """Prints an example of each task, its capacity and the memory that a run would take.

    Raises:
        ConfigError: every mistake in the file, the model, the records and the output folder.
    """
    prepared, mistakes, warnings = survey(path, overrides)
    if prepared is None:  # with the warnings, so that the next check brings no surprise
        raise ConfigError([*mistakes, *(replace(w, message=f"warning: {w.message}") for w in warnings)])
    config, out = prepared.config, tables.console()
    out.print(f"{config.file}: {len(config.tasks)} tasks on {config.model} into {config.output}")
    if prepared.existing:
        done = ", ".join(prepared.existing.task_names) or "none"
        out.print(f"the checkpoint exists already; finished tasks: {done}")
    for task in config.tasks:
        _print_task(out, config, task, prepared.data[task.name], prepared)
    _print_capacity(out, prepared)
    _print_retention(out, prepared)
    _print_memory(out, prepared)
    for warning in warnings:
        out.print(f"warning: {warning}")
    out.print("no mistakes found")
    return 0


def steps(task: TaskConfig, examples: int) -> int:
    """Optimizer steps of a task's training; the last, smaller batch of an epoch counts as a step."""
    if task.training.max_steps is not None:
        return task.training.max_steps
    return max(1, math.ceil(task.training.epochs * math.ceil(examples / task.training.batch_size)))


def _print_task(out: Console, config: RunConfig, task: TaskConfig, data: TaskData, prepared: PreparedRun) -> None:
    out.print()
    done = task.name not in prepared.waiting
    out.print(f"{task.name}{' (finished)' if done else ''}")
    t, c = task.training, task.calibration
    if task.data.streaming:
        out.print(f"  streaming: only the first {data.records} records were read; all that follows is about them")
    out.print(f"  {data.records} records, {len(data.train)} examples of {_lengths(data.train)} tokens")
    for name, evaluation in data.evaluation.items():
        choices = f", choices {', '.join(evaluation.choices)}" if evaluation.choices else ""
        out.print(f"  evaluation {name}: {len(evaluation.examples)} examples, {data.metric}{choices}")
    if not data.evaluation:
        out.print("  no evaluation records (data.eval): the task gets no score")
    out.print(
        f"  calibration: {c.steps} steps of {c.optimizer}, batch {c.batch_size}, rate {c.learning_rate:g}; "
        f"training: {steps(task, len(data.train))} steps, batch {t.batch_size}, rate {t.learning_rate:g}, "
        f"alpha {task.alpha:g}, start {task.start}"
    )
    if task.objective == "dpo":
        out.print("  objective: dpo; an example is the preferred answer, and a step sees both answers of each")
    if t.early_stopping is not None:
        often = f"every {t.early_stopping.every} steps" if t.early_stopping.every else "once an epoch"
        out.print(
            f"  early stopping: the loss on the evaluation sets is measured {often}; training ends after "
            f"{t.early_stopping.patience} without a smaller one, and keeps the best values"
        )
    if t.packing:
        from loraf_train.trainer.packing import first_fit  # imports torch; reports of mistakes do not wait for it

        rows = len(first_fit([len(example.input_ids) for example in data.train], t.max_length))
        out.print(f"  packing: {len(data.train)} examples would fill {rows} rows of {t.max_length} tokens")
    out.print("  one example; the loss is taken on the " + ("bright text" if out.is_terminal else "text in ⟦ ⟧"))
    _print_example(out, data.train[0], prepared.tokenizer)
    if data.rejected:
        out.print("  and the answer that it is preferred to")
        _print_example(out, data.rejected[0], prepared.tokenizer)


def _print_example(out: Console, example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    from rich.text import Text

    line = Text()
    for learned, part in groupby(
        zip(example.labels(), example.input_ids, strict=True), lambda entry: entry[0] != IGNORED
    ):
        text = tokenizer.decode([token for _, token in part])
        assert isinstance(text, str)  # a list only for a batch of sequences
        if out.is_terminal:
            line.append(text, "bold green" if learned else "dim")
        else:
            line.append(f"{LOSS_BEGINS}{text}{LOSS_ENDS}" if learned else text)
    out.print(line)


def _lengths(examples: Sequence[Example]) -> str:
    lengths = [len(example.input_ids) for example in examples]
    return f"{min(lengths)} to {max(lengths)} (mean {sum(lengths) / len(lengths):.0f})"


def _print_capacity(out: Console, prepared: PreparedRun) -> None:
    """Prints K of every task and what is free after it, the checkpoint's tasks first."""
    model, existing = prepared.model, prepared.existing
    rank = existing.rank if existing else prepared.config.adapter.rank
    total = sum(d_out for d_out, _ in model.modules.values()) * rank
    tasks = [(task.name, task.sparsity, task.parameters) for task in existing.tasks] if existing else []
    tasks += [(t.name, t.sparsity, k_of(t, model, rank)) for t in prepared.config.tasks if t.name in prepared.waiting]
    free, rows = total, []
    for name, sparsity, k in tasks:
        free -= k
        rows.append([name, f"{sparsity:g}", f"{k:,}", f"{k / total:.2%}", f"{free:,}", f"{free / total:.2%}"])
    title = f"capacity: {len(model.modules)} modules, rank {rank}, {total:,} positions"
    out.print()
    out.print(tables.table(["task", "sparsity", "K", "share", "free after it", "share free"], rows, title))


def _print_retention(out: Console, prepared: PreparedRun) -> None:
    """Prints what the statistics of the tasks to train will take, and which finished tasks have none."""
    config, existing = prepared.config, prepared.existing
    if config.retention is None:
        return
    rank = existing.rank if existing else config.adapter.rank
    shapes = {name: (d_out, rank) for name, (d_out, _) in prepared.model.modules.items()}
    out.print()
    out.print(
        f"retention: budget {config.retention.budget:g}; statistics take {size_text(stored_bytes(shapes))} a task, and "
        f"{EXAMPLES} training examples are read {1 + ROUNDS} times when a task ends"
    )
    if config.retention.base == base_text.SELF:
        out.print(
            f"  the base model is protected on {base_text.SEQUENCES} texts of up to {base_text.NEW_TOKENS} tokens that "
            "it writes itself when the run starts"
        )
    elif prepared.base_text is not None:
        text = prepared.base_text
        out.print(
            f"  the base model is protected on {min(len(text), EXAMPLES)} of {len(text)} examples of {_lengths(text)} "
            f"tokens of {config.retention.base}"
        )
    lacking = [task.name for task in existing.tasks if task.statistics is None] if existing else []
    if lacking:
        out.print(f"  without statistics, so not protected: {', '.join(lacking)} (see `loraf-train protect`)")


def k_of(task: TaskConfig, model: BaseModelShape, rank: int) -> int:
    """The number of values that a task trains, over all modules."""
    return sum(positions_per_matrix(task.sparsity, d_out, rank) for d_out, _ in model.modules.values())


@dataclass(frozen=True)
class Memory:
    """Memory that training takes besides activations, in bytes.

    Attributes:
        base: the frozen base model.
        projections: A of every module.
        calibration: B on its free positions: values, gradients and the optimizer's moments in float32, and positions;
            and the values and positions of earlier tasks.
        training: the same for the task's K positions, with AdamW.
        lora: weights, gradients and AdamW's moments of LoRA of the same rank, for comparison.
    """

    base: int
    projections: int
    calibration: int
    training: int
    lora: int


def memory(prepared: PreparedRun, bytes_per_weight: int) -> Memory:
    """Estimates the memory of the task that needs most, from the sizes of what is kept; nothing is measured."""
    model, config = prepared.model, prepared.config
    rank = config.adapter.rank
    shapes = model.modules.values()
    entry = 4 + 4 + 8  # a float32 value, its gradient, AdamW's two moments
    waiting = [task for task in config.tasks if task.name in prepared.waiting]
    taken = sum(task.parameters for task in prepared.existing.tasks) if prepared.existing else 0
    training = calibration = 0
    total = sum(d_out for d_out, _ in shapes) * rank
    for task in waiting:
        k = k_of(task, model, rank)
        moments = 8 if task.calibration.optimizer == "adamw" else 0
        calibration = max(calibration, (total - taken) * (4 + 4 + moments + 4) + taken * 8)
        training = max(training, k * (entry + 4) + taken * 8)
        taken += k
    packed = sum(d_out * d_in for d_out, d_in in shapes) if config.quantization else 0  # at least the targets
    return Memory(
        base=int((model.parameters - packed) * bytes_per_weight + packed * _FOUR_BITS),
        projections=sum(d_in for _, d_in in shapes) * rank * bytes_per_weight,
        calibration=calibration,
        training=training,
        lora=sum(d_out + d_in for d_out, d_in in shapes) * rank * entry,
    )


def _print_memory(out: Console, prepared: PreparedRun) -> None:
    import torch

    precision = prepared.config.precision
    if precision == "auto":
        precision = "bfloat16" if torch.cuda.is_available() else "float32"
    estimate = memory(prepared, 2 if precision == "bfloat16" else 4)
    held = (
        f"{precision}, most in four bits ({prepared.config.quantization})"
        if prepared.config.quantization
        else precision
    )
    rows = [
        [f"base model, {prepared.model.parameters:,} weights in {held}", size_text(estimate.base)],
        ["projections A", size_text(estimate.projections)],
        ["calibration: B on its free positions, gradient and optimizer", size_text(estimate.calibration)],
        ["training: K values, gradient and AdamW, earlier tasks", size_text(estimate.training)],
        ["for comparison: LoRA's weights, gradients and AdamW", size_text(estimate.lora)],
    ]
    out.print(tables.table(["memory without activations (estimate)", "bytes"], rows))
