"""Scores of a transformers model on evaluation sets: greedy answers in batches, or the loss of the right ones.

Every example counts, the last partial batch too. Which task set the model holds is the caller's affair
(`loraf.delta.Merger`); here it is a label that every score carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loraf.tasksets import TaskSet
from loraf_train.data.examples import EvaluationExample, EvaluationSet
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS, LOWER_IS_BETTER, MEAN, OWN_METRIC_NEW_TOKENS, is_right
from loraf_train.grading.custom import mean_grade
from loraf_train.settings.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_BATCH = 64
MAX_BATCH_TOKENS = 1 << 14  # of one batch, prompts and new tokens together: bounds the key-value cache


@dataclass(frozen=True)
class Score:
    """One number and what it belongs to.

    Attributes:
        set: canonical text of the task set that acted.
        evaluation: name of the evaluation set; "mean": the plain mean of the task's sets.
        score: share of right answers, or the mean of a metric of the user's own; for `loss`, nats a token.
        count: examples it rests on.
    """

    set: str
    task: str
    evaluation: str
    metric: str
    score: float
    count: int

    def entry(self) -> dict[str, Any]:
        """As the manifest stores it beside its task."""
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
    evaluation_sets: Mapping[str, EvaluationSet],
    task_set: TaskSet,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Scores one task; with several evaluation sets, their plain mean comes last.

    Args:
        model: holds `task_set` already.
        task_set: for the labels.
        on_progress: told how many examples of how many are done.

    Raises:
        ConfigError: the user's own metric fails on a record.
    """
    label = str(task_set)
    total = sum(len(s.examples) for s in evaluation_sets.values())
    done = 0
    scores = []
    for evaluation in evaluation_sets.values():

        def advance(count: int, before: int = done) -> None:
            on_progress(before + count, total)

        if task.metric == "loss":
            value = completion_loss(model, evaluation.examples, advance)
        else:
            new_tokens = task.max_new_tokens or DEFAULT_NEW_TOKENS.get(task.metric, OWN_METRIC_NEW_TOKENS)
            prompts = [example.prompt_ids for example in evaluation.examples]
            answers = generate(model, tokenizer, prompts, new_tokens, advance)
            if task.grade is not None:
                value = mean_grade(task.grade, answers, evaluation.examples)
            else:
                right = sum(
                    is_right(task.metric, answer, example.expected, evaluation.choices)
                    for answer, example in zip(answers, evaluation.examples, strict=True)
                )
                value = right / len(evaluation.examples)
        scores.append(Score(label, task.name, evaluation.name, task.metric, value, len(evaluation.examples)))
        done += len(evaluation.examples)
    if len(scores) > 1:
        mean = sum(s.score for s in scores) / len(scores)
        scores.append(Score(label, task.name, MEAN, task.metric, mean, total))
    return scores


def headline(scores: Sequence[Score]) -> Score | None:
    """The one number of a task among its scores of one set: the mean, or the only one."""
    return scores[-1] if scores else None


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
    """Greedy answers, without special tokens, in the order of the prompts. They end at an end of sequence.

    Args:
        prompts: token ids, at least one each.
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
            for row, i in enumerate(batch):  # padding on the left: every answer begins in the same column
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            for row, i in enumerate(batch):
                answers[i] = tokenizer.decode(_until_end(out[row, width:].tolist(), ends), skip_special_tokens=True)
            done += len(batch)
            on_progress(done)
    return answers


@torch.no_grad()
def completion_loss(
    model: PreTrainedModel,
    examples: Sequence[EvaluationExample],
    on_progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Mean loss in nats over all completion tokens of all examples, the end of sequence included."""
    total, tokens, done = 0.0, 0, 0
    sequences = [example.example for example in examples]
    with _evaluating(model):
        for batch in batches([len(s.input_ids) for s in sequences], 0):
            width = max(len(sequences[i].input_ids) for i in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
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
            tokens += int((labels != -100).sum())
            done += len(batch)
            on_progress(done)
    return total / tokens


def batches(lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, min(MAX_BATCH, MAX_BATCH_TOKENS // (lengths[order[start]] + new_tokens)))
        yield order[start : start + size]
        start += size


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's, then those of the model's own generation settings."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    more: Iterable[int] = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off; the mode before comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _for_answers(model: PreTrainedModel, ends: list[int], pad: int, max_new_tokens: int) -> Iterator[None]:
    """Greedy settings alone: `generate` would fill what is not set from the model's own (sampling, penalties)."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=pad, max_new_tokens=max_new_tokens, use_cache=True
    )
    try:
        with _evaluating(model):
            yield
    finally:
        model.generation_config = before
