"""Scores of a transformers model on evaluation sets: greedy answers, the loss of the right ones, or preferences.

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
from loraf_train.adapter import model_limits
from loraf_train.data.examples import IGNORED, EvaluationExample, Example
from loraf_train.data.records import Faults
from loraf_train.data.task_data import TaskData
from loraf_train.grading.builtin import LOWER_IS_BETTER, MEAN, PREFERENCE, exact_match, is_right, mean_interval
from loraf_train.grading.custom import Grade, MetricFault, graded
from loraf_train.scoring.identity import answer_tokens, evaluation_digest
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
        digest: identifies what was measured, see `identity.evaluation_digest`; empty of a mean over evaluation sets,
            and of scores that an earlier release stored.
        interval: 95 % interval of a mean of grades; None: the score is of another kind.
    """

    set: str
    task: str
    evaluation: str
    metric: str
    score: float
    count: int
    digest: str = ""
    interval: tuple[float, float] | None = None

    def entry(self) -> dict[str, Any]:
        """Returns the score as the manifest stores it with its task."""
        entry: dict[str, Any] = {
            "set": self.set,
            "evaluation": self.evaluation,
            "metric": self.metric,
            "score": self.score,
            "count": self.count,
        }
        if self.digest:
            entry["digest"] = self.digest
        if self.interval is not None:
            entry["interval"] = list(self.interval)
        return entry


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

        interval = None
        if metric == "loss":
            value = completion_loss(model, evaluation.examples, advance)
        elif metric == PREFERENCE:
            grades = preference_grades(model, evaluation.examples, advance)
            value, interval = sum(grades) / len(grades), mean_interval(grades)
        else:
            answers = _answers(model, tokenizer, evaluation.examples, answer_tokens(task, metric), advance)
            if task.grade is not None:
                grades = _grades(task.grade, [answer.text for answer in answers], evaluation.examples)
                value, interval = sum(grades) / len(grades), mean_interval(grades)
            else:
                right = sum(
                    answer.is_right(metric, example.expected, evaluation.choices)
                    for answer, example in zip(answers, evaluation.examples, strict=True)
                )
                value = right / len(evaluation.examples)
        digest = evaluation_digest(task, metric, evaluation)
        count = len(evaluation.examples)
        scores.append(Score(label, task.name, evaluation.name, metric, value, count, digest, interval))
        done += len(evaluation.examples)
    if len(scores) > 1:
        mean = sum(s.score for s in scores) / len(scores)
        scores.append(Score(label, task.name, MEAN, metric, mean, total))
    return scores


@dataclass(frozen=True)
class _Answer:
    """A generated answer as text, and the right answer's own tokens as text, both decoded in the same way.

    Of a right answer that has special tokens in it, both keep them. The tokenizer may write a text differently than the
    record does (lower case, other spaces, an unknown character): then no answer could equal the record's text, but a
    right one equals `reference`.
    """

    text: str
    reference: str

    def is_right(self, metric: str, expected: str, choices: Sequence[str]) -> bool:
        same = metric == "exact_match" and exact_match(self.text, self.reference)
        return same or is_right(metric, self.text, expected, choices)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EvaluationExample],
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> list[_Answer]:
    generated = generate_ids(
        model, tokenizer, [example.prompt_ids for example in examples], max_new_tokens, on_progress
    )
    ends = end_tokens(model, tokenizer)
    answers = []
    for ids, example in zip(generated, examples, strict=True):
        right = _until_end(example.example.input_ids[example.example.prompt_length :], ends)
        reference = example.graded_text(_text(tokenizer, right))
        with_special = example.graded_text(_text(tokenizer, right, keep_special=True))
        # Only then: elsewhere a stray special token in an answer is ignored.
        keep = with_special != reference and exact_match(with_special, example.expected)
        answers.append(_Answer(example.graded_text(_text(tokenizer, ids, keep)), with_special if keep else reference))
    return answers


def _grades(grade: Grade, answers: Sequence[str], examples: Iterable[EvaluationExample]) -> list[float]:
    """Returns the grade of each answer by a metric of the user's own.

    Raises:
        ConfigError: the function fails; names the first such records.
    """
    grades = []
    by_source: dict[str, Faults] = {}
    for answer, example in zip(answers, examples, strict=True):
        try:
            grades.append(graded(grade, answer, example.record))
        except MetricFault as fault:
            faults = by_source.setdefault(example.source, Faults(example.source))
            faults.add(f"record {example.number}", fault.message, fault.remedy)
    if by_source:
        raise ConfigError(problem for faults in by_source.values() for problem in faults.problems)
    return grades


def higher_is_better(metric: str) -> bool:
    return metric not in LOWER_IS_BETTER


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """As `generate_ids`, but as text, without special tokens."""
    answers = generate_ids(model, tokenizer, prompts, max_new_tokens, on_progress)
    return [_text(tokenizer, ids) for ids in answers]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Returns the token ids of greedy answers up to an end of sequence, without it, in the order of the prompts.

    An answer also ends with the model's positions, if it has a table of them.

    Args:
        prompts: token ids, at least one each.
        on_progress: called with the number of prompts done.
    """
    ends = end_tokens(model, tokenizer)
    pad = model_limits.padding_id(tokenizer, model_limits.vocabulary(model))
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _for_answers(model, ends, pad, max_new_tokens):
        for batch, room in _with_room(prompts, max_new_tokens, model_limits.positions(model)):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, i in enumerate(batch):  # left padding: every answer begins in the same column
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(  # type: ignore[operator] # transformers does not declare it on PreTrainedModel
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room
            )
            for row, i in enumerate(batch):
                answers[i] = _until_end(out[row, width:].tolist(), ends)
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
    with evaluating(model):
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


def preference_grades(
    model: PreTrainedModel,
    examples: Sequence[EvaluationExample],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Returns 1 for each pair whose chosen answer the model finds more likely, 0 for the others, and 0.5 for equals.

    An answer's probability is that of all its tokens, end of sequence included. No reference model takes part.
    """
    return [(margin > 0) + 0.5 * (margin == 0) for margin in margins(model, examples, on_progress)]


def margins(
    model: PreTrainedModel,
    examples: Sequence[EvaluationExample],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Returns log p(chosen) − log p(rejected) of each pair, in nats."""
    half = len(examples)
    sequences = [e.example for e in examples] + [e.rejected for e in examples if e.rejected is not None]
    logs = log_probabilities(model, sequences, lambda done: on_progress(done // 2))
    return [better - worse for better, worse in zip(logs[:half], logs[half:], strict=True)]


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, sequences: Sequence[Example], on_progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Returns the log probability of each completion after its prompt, in nats."""
    totals, done = [0.0] * len(sequences), 0
    with evaluating(model):
        for batch in batches([len(s.input_ids) for s in sequences], 0):
            width = max(len(sequences[i].input_ids) for i in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
            for row, i in enumerate(batch):
                length = len(sequences[i].input_ids)
                ids[row, :length] = torch.tensor(sequences[i].input_ids)
                mask[row, :length] = 1
                labels[row, :length] = torch.tensor(sequences[i].labels())
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1]
            targets = labels[:, 1:].to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
            for i, total in zip(batch, (-losses.double().sum(1)).tolist(), strict=True):
                totals[i] = total
            done += len(batch)
            on_progress(done)
    return totals


def _with_room(
    prompts: Sequence[Sequence[int]], new_tokens: int, positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Yields batches as `batches` does, each with the number of tokens that its answers may have.

    A prompt that leaves fewer positions than `new_tokens` is a batch by itself; the last token takes no position.
    """
    for batch in batches([len(prompt) for prompt in prompts], new_tokens):
        if positions is None or max(len(prompts[i]) for i in batch) + new_tokens - 1 <= positions:
            yield batch, new_tokens
        else:
            for i in batch:
                yield [i], max(1, min(new_tokens, positions - len(prompts[i]) + 1))


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


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], keep_special: bool = False) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=not keep_special)
    assert isinstance(text, str)  # a list only for a batch of sequences
    return text


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
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
        with evaluating(model):
            yield
    finally:
        model.generation_config = before
