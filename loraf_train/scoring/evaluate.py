"""Scores of a transformers model on evaluation sets: greedy answers in batches, or the loss of the right answers.

Every example counts, including the last partial batch. The caller decides which task set the model holds
(`loraf.delta.Merger`); here it is only a label of each score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loraf.errors import ConfigError
from loraf.tasksets import TaskSet
from loraf_train.data.examples import IGNORED, EvaluationExample
from loraf_train.data.records import Faults
from loraf_train.data.task_data import TaskData
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS, LOWER_IS_BETTER, MEAN, OWN_METRIC_NEW_TOKENS, is_right
from loraf_train.grading.custom import Grade, MetricFault, graded
from loraf_train.settings.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_BATCH = 64
MAX_BATCH_TOKENS = 1 << 14  # prompts and new tokens of one batch: bounds the key-value cache


@dataclass(frozen=True)
class Score:
    """One score and what it belongs to.

    Attributes:
        set: canonical text of the active task set.
        evaluation: name of the evaluation set; "mean": the plain mean over the task's sets.
        score: share of right answers, or the mean of a metric of the user's own; for `loss`, nats per token.
        count: number of examples.
    """

    set: str
    task: str
    evaluation: str
    metric: str
    score: float
    count: int

    def entry(self) -> dict[str, Any]:
        """Returns the score as the manifest stores it with its task."""
        return {
            "set": self.set,
            "evaluation": self.evaluation,
            "metric": self.metric,
            "score": self.score,
            "count": self.count,
        }


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    data: TaskData,
    task_set: TaskSet,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Scores one task on its evaluation sets; if there are several, their plain mean comes last.

    Args:
        model: already holds `task_set`.
        task_set: for the labels.
        on_progress: called with the number of examples done and their total.

    Raises:
        ConfigError: a metric of the user's own fails on a record.
    """
    label, metric = str(task_set), data.metric
    total = sum(len(evaluation.examples) for evaluation in data.evaluation.values())
    done = 0
    scores = []
    for evaluation in data.evaluation.values():

        def advance(count: int, before: int = done) -> None:
            on_progress(before + count, total)

        if metric == "loss":
            value = completion_loss(model, evaluation.examples, advance)
        else:
            new_tokens = task.max_new_tokens or DEFAULT_NEW_TOKENS.get(metric, OWN_METRIC_NEW_TOKENS)
            prompts = [example.prompt_ids for example in evaluation.examples]
            answers = generate(model, tokenizer, prompts, new_tokens, advance)
            if task.grade is not None:
                value = mean_grade(task.grade, answers, evaluation.examples)
            else:
                right = sum(
                    is_right(metric, answer, example.expected, evaluation.choices)
                    for answer, example in zip(answers, evaluation.examples, strict=True)
                )
                value = right / len(evaluation.examples)
        scores.append(Score(label, task.name, evaluation.name, metric, value, len(evaluation.examples)))
        done += len(evaluation.examples)
    if len(scores) > 1:
        mean = sum(s.score for s in scores) / len(scores)
        scores.append(Score(label, task.name, MEAN, metric, mean, total))
    return scores


def mean_grade(grade: Grade, answers: Sequence[str], examples: Iterable[EvaluationExample]) -> float:
    """Returns the mean score of an evaluation set by a metric of the user's own.

    Raises:
        ConfigError: the function fails; names the first such records.
    """
    total = 0.0
    by_source: dict[str, Faults] = {}
    for answer, example in zip(answers, examples, strict=True):
        try:
            total += graded(grade, answer, example.record)
        except MetricFault as fault:
            faults = by_source.setdefault(example.source, Faults(example.source))
            faults.add(f"record {example.number}", fault.message, fault.remedy)
    if by_source:
        raise ConfigError(problem for faults in by_source.values() for problem in faults.problems)
    return total / len(answers)


def higher_is_better(metric: str) -> bool:
    return metric not in LOWER_IS_BETTER


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Returns greedy answers up to an end of sequence, without special tokens, in the order of the prompts.

    Args:
        prompts: token ids, at least one each.
        on_progress: called with the number of prompts done.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    answers: list[str] = [""] * len(prompts)
    done = 0
    with _for_answers(model, ends, pad, max_new_tokens):
        for batch in batches([len(prompt) for prompt in prompts], max_new_tokens):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, i in enumerate(batch):  # left padding: every answer begins in the same column
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(  # type: ignore[operator] # transformers does not declare it on PreTrainedModel
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            )
            for row, i in enumerate(batch):
                answer = tokenizer.decode(_until_end(out[row, width:].tolist(), ends), skip_special_tokens=True)
                assert isinstance(answer, str)  # a list only for a batch of sequences
                answers[i] = answer
            done += len(batch)
            on_progress(done)
    return answers


@torch.no_grad()
def completion_loss(
    model: PreTrainedModel,
    examples: Sequence[EvaluationExample],
    on_progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Returns the mean loss in nats over all completion tokens of all examples, end of sequence included."""
    total, tokens, done = 0.0, 0, 0
    sequences = [example.example for example in examples]
    with _evaluating(model):
        for batch in batches([len(s.input_ids) for s in sequences], 0):
            width = max(len(sequences[i].input_ids) for i in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, IGNORED)
            for row, i in enumerate(batch):
                length, begin = len(sequences[i].input_ids), max(1, sequences[i].prompt_length)
                ids[row, :length] = torch.tensor(sequences[i].input_ids)
                mask[row, :length] = 1
                labels[row, begin:length] = ids[row, begin:length]
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device), reduction="sum"
            )
            total += float(loss)
            tokens += int((labels != IGNORED).sum())
            done += len(batch)
            on_progress(done)
    return total / tokens


def batches(lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
    """Yields indices in batches of similar length, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, min(MAX_BATCH, MAX_BATCH_TOKENS // (lengths[order[start]] + new_tokens)))
        yield order[start : start + size]
        start += size


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end an answer: the tokenizer's, then those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    more: Iterable[int] = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turns dropout off, and restores the mode afterwards."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _for_answers(model: PreTrainedModel, ends: list[int], pad: int, max_new_tokens: int) -> Iterator[None]:
    """Sets greedy decoding only: `generate` would take the rest from the model's own config (sampling, penalties)."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call] # transformers does not type it
        do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=pad, max_new_tokens=max_new_tokens, use_cache=True
    )
    try:
        with _evaluating(model):
            yield
    finally:
        model.generation_config = before
