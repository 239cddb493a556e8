"""Checks records against the model: what is beyond its embedding or its positions, or longer than its context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf.errors import Problem
from loraf_train.data.task_data import TaskData
from loraf_train.sequence.base_checks import BaseModelShape
from loraf_train.settings.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Sequences:
    """Token ids that the model will read, and the fields of the file that they come from.

    Attributes:
        what: they are, for messages.
        source: field with the records.
        length: field that decides their length.
        shorten: remedy for a sequence that is too long, with a place for the limit.
    """

    ids: list[list[int]]
    what: str
    source: str
    length: str
    shorten: str


def oversized(
    config: RunConfig, model: BaseModelShape, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, TaskData]
) -> list[Problem]:
    """Returns what the model cannot read at all: token ids beyond its embedding, sequences beyond its positions."""
    file, problems = str(config.file), []
    for sequences in _sequences(config, data):
        highest = max(max(ids, default=0) for ids in sequences.ids)
        if highest >= model.vocabulary:
            number = next(n for n, ids in enumerate(sequences.ids, 1) if highest in ids)
            token = tokenizer.convert_ids_to_tokens(highest)
            message = f"{sequences.what} {number} has the token {token!r} with id {highest}"
            message += f", but the model's embedding has {model.vocabulary} rows"
            remedy = "use the tokenizer that belongs to the model, or take the token out of the records"
            problems.append(Problem(message, sequences.source, file, remedy))
        longest = max(map(len, sequences.ids))
        if model.positions is not None and longest > model.positions:
            message = f"{_longest(sequences)}, but the model has {model.positions} positions and no more"
            problems.append(Problem(message, sequences.length, file, sequences.shorten.format(model.positions)))
    return problems


def beyond_context(config: RunConfig, model: BaseModelShape, data: Mapping[str, TaskData]) -> list[Problem]:
    """Returns what is longer than the sequences that the model was trained on, where it can be read nevertheless."""
    if model.context is None or model.positions is not None:
        return []
    return [
        Problem(
            f"{_longest(sequences)}, but the model's context is {model.context}",
            sequences.length,
            str(config.file),
            f"{sequences.shorten.format(model.context)}, or expect worse answers",
        )
        for sequences in _sequences(config, data)
        if max(map(len, sequences.ids)) > model.context
    ]


def _longest(sequences: _Sequences) -> str:
    lengths = list(map(len, sequences.ids))
    return f"{sequences.what} {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens"


def _sequences(config: RunConfig, data: Mapping[str, TaskData]) -> Iterator[_Sequences]:
    for i, task in enumerate(config.tasks):
        if task.name not in data:
            continue
        of_task = data[task.name]
        yield _Sequences(
            [example.input_ids for example in (*of_task.train, *of_task.rejected)],
            "training example",
            f"tasks[{i}].data.train",
            f"tasks[{i}].training.max_length",
            "set it to {} or less",
        )
        for name, evaluation in of_task.evaluation.items():
            whole = of_task.metric in ("loss", "preference") or task.training.early_stopping is not None
            yield _Sequences(
                [e.example.input_ids if whole else e.prompt_ids for e in evaluation.examples],
                "example" if whole else "the prompt of example",
                f"tasks[{i}].data.eval.{name}",
                f"tasks[{i}].data.eval.{name}",
                "shorten it to {} or less",
            )
