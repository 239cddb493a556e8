"""What a run prints while it trains: the progress of each phase, and the scores whenever a task is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraf.units import size_text
from loraf_train.retention import of_base
from loraf_train.retention.protection import OVER
from loraf_train.scoring import table
from loraf_train.sequence.preflight import PreparedRun
from loraf_train.sequence.runner import Observer
from loraf_train.terminal import tables
from loraf_train.terminal.progress import Progress, Report

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint
    from loraf_train.settings.config import TaskConfig


class RunProgress(Observer):
    """Prints the progress of each phase; scores all tasks so far whenever one is finished.

    Args:
        evaluate: whether to measure scores.
    """

    def __init__(self, prepared: PreparedRun, out: Console, progress: Progress, evaluate: bool):
        self._prepared = prepared
        self._out = out
        self._progress = progress
        self._evaluate = evaluate

    def task_started(self, task: TaskConfig) -> None:
        order = self._prepared.config.tasks.index(task) + 1
        count = f"{len(self._prepared.data[task.name].train)} examples"
        examples = "streamed examples" if task.data.streaming else count
        self._out.print(f"task {task.name} ({order} of {len(self._prepared.config.tasks)}): {examples}")
        self._calibration = self._progress.part(f"{task.name}: calibration step")
        self._training = self._progress.part(f"{task.name}: training step")

    def remarked(self, task: TaskConfig, remark: str) -> None:
        self._out.print(f"{task.name}: {remark}")

    def resumed(self, task: TaskConfig, after: str) -> None:
        self._out.print(f"{task.name}: resumes after {after}")

    def calibration_step(self, loss: float, step: int, total: int) -> None:
        self._calibration(step, total, f"loss {loss:.4f}")

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        self._training(step, total, f"loss {loss:.4f}, rate {lr:.2e}")

    def evaluated(self, task: TaskConfig, loss: float, step: int, best: bool) -> None:
        self._out.print(f"{task.name}: loss {loss:.4f} on the evaluation sets after step {step}{', the best' * best}")

    def unprotected(self, tasks: Sequence[str]) -> None:
        self._out.print(
            f"without statistics, so that later tasks may change what they answer: {', '.join(tasks)} "
            "(`loraf-train protect` gathers them from their training data)"
        )

    def retained(self, task: TaskConfig, spent: Mapping[str, float], budget: float) -> None:
        names = {name: "the base model" if name == of_base.NAME else name for name in spent}
        over = {name: " (over)" if change > OVER * budget else "" for name, change in spent.items()}
        parts = ", ".join(f"{names[name]} {_change_text(change)}{over[name]}" for name, change in spent.items())
        whose = "logits" if of_base.NAME in spent else "the earlier tasks' logits"
        self._out.print(
            f"{task.name}: predicted change of {whose}, of a budget of {budget:g}: {parts} "
            "(root mean square; the scores with all tasks on show what it costs)"
        )
        if any(over.values()):
            self._out.print("  more steps, or a larger retention.budget, would let it end within the budget")

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        finished = checkpoint.manifest.task(task.name)
        size = size_text(finished.file.bytes)
        self._out.print(
            f"{task.name}: {finished.parameters:,} values in {checkpoint.path / finished.file.path} ({size})"
        )
        if self._evaluate:
            self.score(checkpoint, model)

    def score(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Measures the scores that the table lacks so far, and prints them."""
        reports: dict[table.ScoreKey, Report] = {}

        def advance(key: table.ScoreKey, done: int, total: int) -> None:
            if key not in reports:
                reports[key] = self._progress.part(f"scoring {key.task} with {key.task_set}")
            reports[key](done, total)

        prepared = self._prepared
        scores = table.complete(checkpoint, model, prepared.tokenizer, prepared.config.tasks, prepared.data, advance)
        if scores:
            names = checkpoint.manifest.task_names
            self._out.print(tables.score_table(scores, f"scores after {names[-1]}"))


def _change_text(change: float) -> str:
    """Three decimals, or one digit of a change that would look like none."""
    return f"{change:.1g}" if 0 < change < 0.0005 else f"{change:.3f}"
