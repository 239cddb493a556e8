"""A task's records as token ids, with the tokens that the loss is taken on.

    sources → records (loraf_train.data.records) → prompts and completions (loraf_train.data.forms) → token ids

A prompt is tokenized alone, by the same function as a server's (loraf.prompt_ids), so what is trained is what will be
served, token by token. The completion is tokenized as text that goes on: no token reaches across the border, even
where the tokenizer would merge there, and no blank is put before its first word. An end of sequence is appended and
learned. What is longer than max_length is cut at its end.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf.manifest import Templates
from loraf.prompt_ids import prompt_ids
from loraf_train.data import lori
from loraf_train.data.forms import Form, RecordFault, form_of, plain_text
from loraf_train.data.records import Faults, Record, read
from loraf_train.grading.builtin import expected_answer
from loraf_train.grading.custom import MetricFault, graded
from loraf_train.settings.config import RunConfig, Source, TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
_BEFORE = "\n"  # what a completion is tokenized after


@dataclass(frozen=True)
class Example:
    """One sequence. The loss is taken on input_ids[prompt_length:], the end of sequence included, but for `silent`.

    Attributes:
        silent: further parts [begin, end) without loss, ascending: in a conversation, what others say between the
            assistant's answers.
    """

    input_ids: list[int]
    prompt_length: int
    silent: tuple[tuple[int, int], ...] = ()

    def labels(self) -> list[int]:
        """One label a token, IGNORED where there is no loss; the first token is predicted from nothing."""
        begin = max(1, self.prompt_length)
        labels = [IGNORED] * begin + self.input_ids[begin:]
        for start, end in self.silent:
            labels[start:end] = [IGNORED] * len(labels[start:end])
        return labels


@dataclass(frozen=True)
class EvaluationExample:
    """One question: the whole sequence, never cut, and the right answer as `metrics.is_right` compares with it.

    Of a conversation the assistant's last answer is asked for.

    Attributes:
        record: for a metric of the user's own, what it was read from: `number`, from 1, of `source`.
    """

    example: Example
    expected: str
    record: Record = field(default_factory=dict)
    source: str = ""
    number: int = 0

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
        longest: tokens of the longest example before any was cut.
    """

    train: list[Example]
    evaluation: dict[str, EvaluationSet]
    templates: Templates
    records: int
    cut: int = 0
    dropped: int = 0
    longest: int = 0


@dataclass(frozen=True)
class _Text:
    """A record: (prompt, completion) of each answer, the right answer in the metric's form, and where it stands."""

    turns: list[tuple[str, str]]
    expected: str
    source: Source
    number: int
    record: Record


def load_all(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, eval_limit: int | None = None
) -> tuple[dict[str, TaskData], list[Problem]]:
    """The data of every task that can be had, and every mistake.

    Args:
        tokenizer: None where the model cannot be had: records are checked as far as that goes, no data comes back.
        eval_limit: as `data.eval_limit`, for every evaluation set.
    """
    loaded: dict[str, TaskData] = {}
    problems = [] if tokenizer is None else require_eos(tokenizer)
    for task in config.tasks:
        data, found = _load(task, tokenizer, config.seed, eval_limit)
        problems += [problem for problem in found if problem not in problems]
        if data is not None:
            loaded.setdefault(task.name, data)  # two of one name are a mistake that is reported elsewhere
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
    data, found = _load(task, tokenizer, seed, eval_limit)
    if problems or found:
        raise ConfigError([*problems, *found])
    return data


def _load(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int, eval_limit: int | None
) -> tuple[TaskData | None, list[Problem]]:
    """The task's data if its records have no mistakes, and the mistakes."""
    problems: list[Problem] = []
    form: Form | None = None
    train: list[_Text] = []
    for source, records in _sampled(_read_all(task.data.train, "train", problems), task.data.limit, seed):
        faults = Faults(str(source))
        form = form or _form(task, *records[0], tokenizer, faults)
        train += [] if form is None else _texts(form, source, records, faults)
        problems += faults.problems
        if form is None:
            break
    limit = min((n for n in (task.data.eval_limit, eval_limit) if n is not None), default=None)
    evaluation: dict[str, tuple[tuple[str, ...], list[_Text]]] = {}
    for name, source in task.data.eval.items():
        for _, records in _sampled(_read_all([source], "test", problems), limit, seed):
            faults = Faults(str(source))
            choices = source.choices or (lori.choices_of(records[0][1]) if task.recipe == "lori" else ())
            texts = [] if form is None else _texts(form, source, records, faults, task.metric, choices)
            _try_grade(task, texts[:1], faults)
            evaluation[name] = (choices, texts)
            problems += faults.problems
    if problems or tokenizer is None or form is None:
        return None, problems
    special_tokens = form.templates.special_tokens
    try:
        examples = [e for found in tokenize(train, tokenizer, special_tokens) for e in found]
        sets = {}
        for name, (choices, texts) in evaluation.items():
            found = tokenize([_last_answer(text) for text in texts], tokenizer, special_tokens)
            asked = [_asked(task, e, text) for (e,), text in zip(found, texts, strict=True)]
            sets[name] = EvaluationSet(name, asked, choices)
    except ConfigError as error:
        return None, list(error.problems)
    most = task.training.max_length
    kept = [Example(e.input_ids[:most], e.prompt_length, e.silent) for e in examples if e.prompt_length < most]
    if not kept:
        longest = min(e.prompt_length for e in examples) + 1
        message = f"every prompt of task {task.name!r} fills max_length {most}: all {len(examples)} examples are lost"
        remedy = f"set max_length to at least {longest}, one more than the shortest prompt"
        return None, [Problem(message, "training.max_length", str(task.data.train[0]), remedy)]
    return TaskData(
        train=kept,
        evaluation=sets,
        templates=form.templates,
        records=len(train),
        cut=sum(len(e.input_ids) > most > e.prompt_length for e in examples),
        dropped=len(examples) - len(kept),
        longest=max(len(e.input_ids) for e in examples),
    ), []


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
        return (lori.form_of if task.recipe == "lori" else form_of)(task.data, first, tokenizer)
    except RecordFault as fault:
        faults.add(f"record {number}", fault.message, fault.remedy)
        return None


def _texts(
    form: Form,
    source: Source,
    records: list[tuple[int, Record]],
    faults: Faults,
    metric: str | None = None,
    choices: tuple[str, ...] = (),
) -> list[_Text]:
    texts = []
    for number, record in records:
        try:
            turns = form.texts(record)
        except RecordFault as fault:
            faults.add(f"record {number}", fault.message, fault.remedy)
            continue
        expected = ""
        if metric is not None:
            found = expected_answer(metric, turns[-1][1], plain_text(record.get("answer")), choices)
            if found is None:
                what = "one of the choices" if metric == "choice" else "a number"
                remedy = f"mend the record, the choices, or use another metric than {metric}"
                faults.add(f"record {number}", f"has no right answer: its completion names not {what}", remedy)
                continue
            expected = found
        texts.append(_Text(turns, expected, source, number, record))
    return texts


def _try_grade(task: TaskConfig, texts: list[_Text], faults: Faults) -> None:
    """A metric of the user's own on right answers: what fails here would fail after the training."""
    for text in texts if task.grade is not None else ():
        try:
            graded(task.grade, text.turns[-1][1], text.record)
        except MetricFault as fault:
            faults.add(f"record {text.number}", fault.message, fault.remedy)


def _asked(task: TaskConfig, example: Example, text: _Text) -> EvaluationExample:
    if task.grade is None:
        return EvaluationExample(example, text.expected)
    return EvaluationExample(example, text.expected, text.record, str(text.source), text.number)


def _last_answer(text: _Text) -> _Text:
    return replace(text, turns=text.turns[-1:])


def tokenize(
    texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True
) -> list[list[Example]]:
    """The sequences of each record, as long as they are.

    The answers of a conversation come into one sequence as far as the tokens of each prompt begin with the sequence so
    far. Where they do not (a template that takes thoughts out of earlier answers, tokens that merge across a border),
    a new sequence begins, so that every answer is learned after the very tokens that it would be served after.

    Args:
        special_tokens: see `Templates`.

    Raises:
        ConfigError: prompts without a single token, from which no answer could begin.
    """
    turns = [turn for text in texts for turn in text.turns]
    prompts = iter(prompt_ids(tokenizer, [prompt for prompt, _ in turns], special_tokens))
    completions = iter(_going_on(tokenizer, [completion for _, completion in turns]))
    examples = []
    empty: list[_Text] = []
    for text in texts:
        found = [(next(prompts), next(completions)) for _ in text.turns]
        if not all(prompt for prompt, _ in found):
            empty.append(text)
        else:
            examples.append(_joined(found, tokenizer.eos_token_id))
    if empty:
        more = f", and of {len(empty) - 1} more records" if len(empty) > 1 else ""
        message = f"its prompt{more} is empty, and the tokenizer adds no token to begin with"
        remedy = "give every record a prompt, or use a model whose tokenizer begins with a BOS"
        raise ConfigError(Problem(message, f"record {empty[0].number}", str(empty[0].source), remedy))
    return examples


def _joined(turns: Iterable[tuple[list[int], list[int]]], eos: int | None) -> list[Example]:
    """(prompt, completion) ids of a record's answers, in order, as sequences; see `tokenize`."""
    examples: list[Example] = []
    ids: list[int] = []
    first, silent = 0, []

    def close() -> None:
        ending = [] if eos is None or ids[-1:] == [eos] and len(ids) > first else [eos]
        examples.append(Example([*ids, *ending], first, tuple(silent)))

    for prompt, completion in turns:
        if ids and prompt[: len(ids)] == ids:
            ended = eos is not None and prompt[len(ids) : len(ids) + 1] == [eos]
            silent.append((len(ids) + ended, len(prompt)))
        else:
            if ids:
                close()
            first, silent = len(prompt), []
        ids = [*prompt, *completion]
    close()
    return examples


def _going_on(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts that follow others.

    SentencePiece tokenizers (Mistral's, Llama 2's) put a blank before whatever they are given, which a text that goes
    on has not: so each is tokenized after a line break, and the break's ids are taken away. A text that would merge
    with the break is tokenized alone.
    """
    if not texts:
        return []

    def ids_of(parts: list[str]) -> list[list[int]]:
        return tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]

    (before,) = ids_of([_BEFORE])
    found = ids_of([_BEFORE + text for text in texts])
    alone = [i for i, ids in enumerate(found) if ids[: len(before)] != before]
    found = [list(ids[len(before) :]) for ids in found]
    for i, ids in zip(alone, ids_of([texts[i] for i in alone]) if alone else [], strict=True):
        found[i] = list(ids)
    return found
