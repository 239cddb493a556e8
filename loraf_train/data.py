"""A task's records as token ids, with the place where the loss begins.

    sources → records (loraf_train.records) → prompt and completion (loraf_train.forms) → token ids

Prompt and completion are tokenized apart, the prompt with the tokenizer's own special tokens (one BOS at most), the
completion without; an end of sequence is appended and learned. What is longer than max_length is cut at its end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf.manifest import Templates
from loraf_train.config import EvaluationSource, RunConfig, Source, TaskConfig
from loraf_train.forms import Form, RecordFault, form_of, plain_text
from loraf_train.metrics import expected_answer
from loraf_train.records import Faults, Record, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One sequence; the loss is taken on input_ids[prompt_length:] only, the end of sequence included."""

    input_ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class EvaluationExample:
    """One question: the whole sequence, never cut, and the right answer as `metrics.is_right` compares with it."""

    example: Example
    expected: str

    @property
    def prompt_ids(self) -> list[int]:
        return self.example.input_ids[: self.example.prompt_length]


@dataclass(frozen=True)
class EvaluationSet:
    """Named questions of a task; `choices` are what the `choice` metric looks for."""

    name: str
    examples: list[EvaluationExample]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """A task's data, ready to train and to score.

    Attributes:
        records: training records read (after `limit`).
        cut: examples that lost their end to max_length.
        dropped: examples left out because nothing of their completion was left.
    """

    train: list[Example]
    evaluation: dict[str, EvaluationSet]
    templates: Templates
    records: int
    cut: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class _Text:
    prompt: str
    completion: str
    expected: str


def load_all(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, eval_limit: int | None = None
) -> tuple[dict[str, TaskData], list[Problem]]:
    """The data of every task that has no mistakes, and the mistakes of the others.

    Args:
        tokenizer: None where the model cannot be had: records are checked as far as that goes, no data comes back.
        eval_limit: as `data.eval_limit`, for every evaluation set.
    """
    loaded: dict[str, TaskData] = {}
    problems: list[Problem] = []
    for task in config.tasks:
        try:
            data = load_task(task, tokenizer, config.seed, eval_limit)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if data is not None:
            loaded[task.name] = data
    return loaded, problems


def load_task(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int, eval_limit: int | None = None
) -> TaskData | None:
    """Reads, formats and tokenizes a task's training and evaluation records.

    Args:
        tokenizer, eval_limit: see `load_all`. Without a tokenizer the answer is None.
        seed: of the shuffle behind `limit` and `eval_limit`.

    Raises:
        ConfigError: sources that cannot be read, records without a field that a template names, answers that the
            metric cannot read, a tokenizer without end of sequence, nothing left to train on. All of the task's
            mistakes, the first few of a file.
    """
    problems = [] if tokenizer is None else require_eos(tokenizer)
    form: Form | None = None
    train: list[_Text] = []
    for source, records in _sampled(_read_all(task.data.train, "train", problems), task.data.limit, seed):
        faults = Faults(str(source))
        form = form or _form(task, *records[0], tokenizer, faults)
        train += [] if form is None else _texts(form, records, faults)
        problems += faults.problems
        if form is None:
            break
    limit = min((n for n in (task.data.eval_limit, eval_limit) if n is not None), default=None)
    evaluation: dict[str, tuple[EvaluationSource, list[_Text]]] = {}
    for name, source in task.data.eval.items():
        for _, records in _sampled(_read_all([source], "test", problems), limit, seed):
            faults = Faults(str(source))
            texts = [] if form is None else _texts(form, records, faults, task.metric, source.choices)
            evaluation[name] = (source, texts)
            problems += faults.problems
    if problems:
        raise ConfigError(problems)
    if tokenizer is None or form is None:
        return None
    examples = tokenize(train, tokenizer)
    kept = [Example(e.input_ids[: task.training.max_length], e.prompt_length) for e in examples]
    kept = [e for e in kept if e.prompt_length < len(e.input_ids)]
    if not kept:
        longest = min(e.prompt_length for e in examples) + 1
        message = f"every prompt of task {task.name!r} fills max_length {task.training.max_length}"
        remedy = f"set max_length to more than {longest}, the shortest prompt's length"
        raise ConfigError(Problem(message, "training.max_length", str(task.data.train[0]), remedy))
    return TaskData(
        train=kept,
        evaluation={
            name: EvaluationSet(
                name,
                [EvaluationExample(e, t.expected) for e, t in zip(tokenize(texts, tokenizer), texts, strict=True)],
                source.choices,
            )
            for name, (source, texts) in evaluation.items()
        },
        templates=form.templates,
        records=len(train),
        cut=sum(len(e.input_ids) > task.training.max_length > e.prompt_length for e in examples),
        dropped=len(examples) - len(kept),
    )


def require_eos(tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """A tokenizer that cannot end an answer, as a problem."""
    if tokenizer.eos_token_id is not None:
        return []
    message = "the tokenizer has no end-of-sequence token, so answers could not learn to end"
    return [
        Problem(message, "eos_token", tokenizer.name_or_path, 'set "eos_token" in the model\'s tokenizer_config.json')
    ]


def _read_all(sources: Sequence[Source], split: str, problems: list[Problem]) -> list[tuple[Source, list[Record]]]:
    found = []
    for source in sources:
        try:
            found.append((source, read(source, split)))
        except ConfigError as error:
            problems += error.problems
    return found


def _sampled(
    sources: list[tuple[Source, list[Record]]], limit: int | None, seed: int
) -> list[tuple[Source, list[tuple[int, Record]]]]:
    """At most `limit` records of all sources together, chosen by the seed, in file order, with their numbers from 1."""
    places = [(s, n) for s, (_, records) in enumerate(sources) for n in range(len(records))]
    if limit is not None and limit < len(places):
        places = sorted(random.Random(seed).sample(places, limit))
    chosen: dict[int, list[tuple[int, Record]]] = {}
    for s, n in places:
        chosen.setdefault(s, []).append((n + 1, sources[s][1][n]))
    return [(sources[s][0], records) for s, records in chosen.items()]


def _form(
    task: TaskConfig, number: int, first: Record, tokenizer: PreTrainedTokenizerBase | None, faults: Faults
) -> Form | None:
    try:
        return form_of(task.data, first, tokenizer)
    except RecordFault as fault:
        faults.add(f"record {number}", fault.message, fault.remedy)
        return None


def _texts(
    form: Form,
    records: list[tuple[int, Record]],
    faults: Faults,
    metric: str | None = None,
    choices: tuple[str, ...] = (),
) -> list[_Text]:
    texts = []
    for number, record in records:
        try:
            prompt, completion = form.texts(record)
        except RecordFault as fault:
            faults.add(f"record {number}", fault.message, fault.remedy)
            continue
        expected = ""
        if metric is not None:
            found = expected_answer(metric, completion, plain_text(record.get("answer")), choices)
            if found is None:
                what = "one of the choices" if metric == "choice" else "a number"
                remedy = f"mend the record, the choices, or use another metric than {metric}"
                faults.add(f"record {number}", f"has no right answer: its completion names not {what}", remedy)
                continue
            expected = found
        texts.append(_Text(prompt, completion, expected))
    return texts


def tokenize(texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Texts to sequences, as long as they are.

    Raises:
        ConfigError: a prompt without a single token, from which no answer could begin.
    """
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_eos = eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    completions = tokenizer([text.completion for text in texts], add_special_tokens=False)["input_ids"]
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if adds_eos:
            prompt = prompt[:-1]
        if bos is not None and prompt[:2] == [bos, bos]:  # the text begins with one already
            prompt = prompt[1:]
        if not prompt:
            remedy = "give every record a prompt, or use a model whose tokenizer begins with a BOS"
            raise ConfigError(
                Problem("a prompt is empty, and the tokenizer adds no token to begin with", remedy=remedy)
            )
        ending = [] if eos is None or completion[-1:] == [eos] else [eos]
        examples.append(Example([*prompt, *completion, *ending], len(prompt)))
    return examples
