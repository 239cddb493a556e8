"""A task's data, ready to train and to score.

    sources → records (data.records) → prompts and completions (data.forms) → token ids (data.examples)

Each source is read once. The records also decide what the settings leave open: their form and, with `recipe: lori`,
metric and choices. Training examples longer than max_length lose their end; those that have nothing left to learn are
dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf.manifest import Templates
from loraf_train.data.cutting import cut, nothing_kept
from loraf_train.data.examples import EvaluationExample, EvaluationSet, Example, RecordText, digest_of, tokenize
from loraf_train.data.forms import lori
from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.doubts import find_doubts, find_empty
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.forms import TemplateForm, form_of
from loraf_train.data.forms.text import require_readable, text_or_none
from loraf_train.data.preferences import Pair, PreferenceForm, cut_pairs, find_doubtful, no_pair_kept, preference_form
from loraf_train.data.record_texts import NumberedRecord, texts_of
from loraf_train.data.records import Faults, Record, read
from loraf_train.data.stream import ExampleStream, read_head
from loraf_train.data.values import Unreadable
from loraf_train.grading.builtin import DEFAULT_METRIC, PREFERENCE, expected_answer
from loraf_train.grading.custom import MetricFault, graded
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.data import RecordSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[RecordSource, str], list[Record]]  # with the arguments of `records.read`


@dataclass(frozen=True)
class TaskData:
    """What a task trains on and is scored on.

    Attributes:
        train: of a task that streams, an `ExampleStream`.
        rejected: of preferences, the other answer to each of `train`; empty: the task learns from completions.
        records: number of training records (after `limit`); of a task that streams, of those read so far.
        metric: the metric of the settings, or the one that the records decide.
        cut: number of examples that lost their end to max_length.
        dropped: number of examples left out because nothing to learn of them fits.
        first_dropped: place of the first of them; empty if there is none.
        longest: tokens of the longest example before any was cut.
        warnings: doubts about the records.
        date: that the prompts name, YYYY-MM-DD; empty: they do not depend on it.
    """

    train: Sequence[Example]
    evaluation: dict[str, EvaluationSet]
    templates: Templates
    records: int
    metric: str
    cut: int = 0
    dropped: int = 0
    first_dropped: str = ""
    longest: int = 0
    warnings: tuple[Problem, ...] = ()
    date: str = ""
    rejected: Sequence[Example] = ()

    @property
    def units(self) -> Sequence[Example] | Sequence[Pair]:
        """What one unit of a batch is: an example, or a preference."""
        return (
            [Pair(*answers) for answers in zip(self.train, self.rejected, strict=True)] if self.rejected else self.train
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that is trained on."""
        return digest_of(self.units)


@dataclass(frozen=True)
class _EvaluationTexts:
    texts: list[RecordText]
    choices: tuple[str, ...]


def load_all(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    eval_limit: int | None = None,
    today: date | None = None,
) -> tuple[dict[str, TaskData], list[Problem]]:
    """Loads the data of all tasks.

    Args:
        tokenizer: None if it could not be loaded: the records are still checked, as far as possible without it.
        eval_limit: an upper bound on `data.eval_limit` of every task.
        today: the date for chat templates that write one; None: today's.

    Returns:
        The data of each task without mistakes (none without a tokenizer), and all mistakes.
    """
    loaded: dict[str, TaskData] = {}
    problems = [] if tokenizer is None else require_eos(tokenizer)
    for task in config.tasks:
        data, problems_of_task = _load(task, tokenizer, config.seed, eval_limit, read, today or date.today())
        problems += [problem for problem in problems_of_task if problem not in problems]
        if data is not None:
            loaded.setdefault(task.name, data)  # a name that occurs twice is reported with the settings
    return loaded, problems


def load_task(
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    eval_limit: int | None = None,
    read_source: Read = read,
    today: date | None = None,
) -> TaskData:
    """Reads, formats and tokenizes a task's training and evaluation records.

    Args:
        seed: determines the sample that `limit` and `eval_limit` take.
        eval_limit: see `load_all`.
        read_source: reads a source's records.
        today: see `load_all`.

    Raises:
        ConfigError: sources that cannot be read, records without a field that a template names, answers that the
            metric cannot read, a tokenizer without an end of sequence, nothing left to train on. Holds all of the
            task's mistakes, but only the first few of each source.
    """
    problems = require_eos(tokenizer)
    data, problems_of_task = _load(task, tokenizer, seed, eval_limit, read_source, today or date.today())
    if problems or data is None:
        raise ConfigError([*problems, *problems_of_task])
    return data


def _load(
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    eval_limit: int | None,
    read_source: Read,
    today: date,
) -> tuple[TaskData | None, list[Problem]]:
    """Returns the task's data, None if there are mistakes or no tokenizer; and the mistakes."""
    problems: list[Problem] = []
    if task.data.streaming:
        sources = read_head(task.data.train, problems)
    else:
        sources = _read_all(task.data.train, "train", problems, read_source)
    metric = _metric(task, sources[0][1][0] if sources else {})
    form: Form | None = None
    train: list[RecordText] = []
    warnings: list[Problem] = []
    for source, records, everything in _sampled(sources, task.data.limit, seed):
        faults, doubts = Faults(str(source)), Faults(str(source), "warnings")
        form = form or _form(task, *records[0], tokenizer, today, faults)
        if form is not None:
            texts = texts_of(form, source, records, faults, doubts)
            find_doubts(form, source, everything, faults, doubts)
            if isinstance(form, PreferenceForm):
                find_doubtful(texts, faults, doubts, "it is not trained on")
            find_empty([t.number for t in texts if _has_empty_completion(form, t)], len(records), doubts)
            train += texts
        problems += faults.problems
        warnings += doubts.problems
        if form is None:
            break
    limit = min((n for n in (task.data.eval_limit, eval_limit) if n is not None), default=None)
    evaluation = _evaluation_texts(task, form, metric, limit, seed, problems, warnings, read_source)
    if problems or tokenizer is None or form is None:
        return None, problems
    try:
        sequences = tokenize(train, tokenizer, form.templates.special_tokens, form.ends)
        others = _rejected(train, form, tokenizer)
        sets = {
            name: EvaluationSet(name, _evaluation_examples(task, form, part.texts, tokenizer), part.choices)
            for name, part in evaluation.items()
        }
    except ConfigError as error:
        return None, list(error.problems)
    max_length = task.training.max_length
    rejected: list[Example] = []
    if isinstance(form, PreferenceForm):
        pairs = cut_pairs([chosen for (chosen,) in sequences], others, train, max_length)
        parts, rejected = pairs.chosen, pairs.rejected
        if not parts.kept:
            return None, [no_pair_kept(pairs, task.name, max_length)]
        warnings += pairs.warnings(max_length)
    else:
        parts = cut(sequences, train, max_length)
    if not parts.kept:
        return None, [nothing_kept(parts.dropped, task.name, max_length)]
    examples: Sequence[Example] = parts.kept
    if task.data.streaming:
        examples = ExampleStream(parts.kept, task.name, task.data.train, form, tokenizer, max_length)
    return TaskData(
        train=examples,
        evaluation=sets,
        templates=form.templates,
        records=len(train),
        metric=metric,
        cut=parts.shortened,
        dropped=len(parts.dropped),
        first_dropped=parts.first_dropped,
        longest=parts.longest,
        warnings=tuple(warnings),
        date=today.isoformat() if form.wrote_date else "",
        rejected=rejected,
    ), []


def _rejected(texts: Sequence[RecordText], form: Form, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The other answer of each preference; empty for other records."""
    if not isinstance(form, PreferenceForm):
        return []
    others = [replace(text, turns=text.rejected) for text in texts]
    return [example for (example,) in tokenize(others, tokenizer, form.templates.special_tokens, form.ends)]


def _has_empty_completion(form: Form, text: RecordText) -> bool:
    if isinstance(form, ChatForm):
        return not all(form.graded_text(completion).strip() for _, completion in text.turns)
    if isinstance(form, PreferenceForm):
        return not form.graded_text(text.turns[0][1]).strip()  # of the rejected one, `find_doubtful` tells
    return isinstance(form, TemplateForm) and not text.turns[-1][1].strip()


def require_eos(tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Returns the problem of a tokenizer without an end of sequence, or no problem."""
    if tokenizer.eos_token_id is not None:
        return []
    message = "the tokenizer has no end-of-sequence token, so the model could not learn to end its answers"
    remedy = 'set "eos_token" in the model\'s tokenizer_config.json'
    return [Problem(message, "eos_token", tokenizer.name_or_path, remedy)]


def _read_all(
    sources: Sequence[RecordSource], split: str, problems: list[Problem], read_source: Read
) -> list[tuple[RecordSource, list[Record]]]:
    """Returns each readable source with its records, at least one; appends what is wrong with the others."""
    readable = []
    for source in sources:
        try:
            readable.append((source, read_source(source, split)))
        except ConfigError as error:
            problems += error.problems
    return readable


def _sampled(
    sources: list[tuple[RecordSource, list[Record]]], limit: int | None, seed: int
) -> list[tuple[RecordSource, list[NumberedRecord], list[Record]]]:
    """Draws at most `limit` records from all sources together by the seed; they stay in file order.

    Returns:
        (source, drawn records, all records) of each source of which one was drawn.
    """
    places = [(s, n) for s, (_, records) in enumerate(sources) for n in range(len(records))]
    if limit is not None and limit < len(places):
        places = sorted(random.Random(seed).sample(places, limit))
    sampled: dict[int, list[NumberedRecord]] = {}
    for s, n in places:
        sampled.setdefault(s, []).append((n + 1, sources[s][1][n]))
    return [(sources[s][0], records, sources[s][1]) for s, records in sampled.items()]


def _metric(task: TaskConfig, first: Record) -> str:
    """Returns the task's metric; `first` is its first training record, empty if none could be read."""
    if task.objective == "dpo":
        return PREFERENCE
    by_recipe = lori.metric_of(first) if task.recipe == "lori" else None
    return task.metric or by_recipe or DEFAULT_METRIC


def _form(
    task: TaskConfig,
    number: int,
    first: Record,
    tokenizer: PreTrainedTokenizerBase | None,
    today: date,
    faults: Faults,
) -> Form | None:
    try:
        if task.objective == "dpo":
            preferences = preference_form(task.data, first, tokenizer)
            return None if preferences is None else preferences.on(today)
        form = (lori.form_of if task.recipe == "lori" else form_of)(task.data, first, tokenizer)
        return None if form is None else form.on(today)
    except RecordFault as fault:
        faults.add(f"record {number}", fault.message, fault.remedy)
        return None


def _evaluation_texts(
    task: TaskConfig,
    form: Form | None,
    metric: str,
    limit: int | None,
    seed: int,
    problems: list[Problem],
    warnings: list[Problem],
    read_source: Read,
) -> dict[str, _EvaluationTexts]:
    """Reads and formats every evaluation set, by name; appends mistakes and doubts.

    Without a form, sources are only read.
    """
    sets = {}
    for name, source in task.data.eval.items():
        readable = _read_all([source], "test", problems, read_source)
        for _, records, everything in _sampled(readable, limit, seed):
            faults, doubts = Faults(str(source)), Faults(str(source), "warnings")
            choices = source.choices or (lori.choices_of(records[0][1]) if task.recipe == "lori" else ())
            texts = [] if form is None else texts_of(form, source, records, faults, doubts)
            if form is not None:
                find_doubts(form, source, everything, faults, doubts)
            if isinstance(form, PreferenceForm):
                find_doubtful(texts, faults, doubts, "it counts half, whatever the model is")
            texts = _with_answers(form, texts, metric, choices, faults)
            _try_grade(task, form, [*texts[:1], *(t for t in texts[1:] if _has_unreadable(t.record))], faults)
            sets[name] = _EvaluationTexts(texts, choices)
            problems += faults.problems
            warnings += doubts.problems
    return sets


def _with_answers(
    form: Form | None, texts: Sequence[RecordText], metric: str, choices: tuple[str, ...], faults: Faults
) -> list[RecordText]:
    """Adds the right answer to each text; records from which it does not follow are added to `faults`."""
    answered = []
    for text in texts:
        given = text.record.get("answer")
        if metric == "choice" and isinstance(given, Unreadable):
            faults.add(f"record {text.number}", f"field 'answer' {given.reason}", given.remedy)
            continue
        answer = text_or_none(given)
        expected = expected_answer(metric, _right_text(form, text), answer, choices)
        if expected is None:
            reason = "names none of the choices" if metric == "choice" else "states no number"
            remedy = f"fix the record or the choices, or use a metric other than {metric}"
            faults.add(f"record {text.number}", f"has no right answer: its completion {reason}", remedy)
        else:
            answered.append(replace(text, expected=expected))
    return answered


def _has_unreadable(record: Record) -> bool:
    try:
        require_readable(record, "")
    except RecordFault:
        return True
    return False


def _right_text(form: Form | None, text: RecordText) -> str:
    """The text of a right answer, as it is graded."""
    completion = text.turns[-1][1]
    return completion if form is None else form.graded_text(completion)


def _try_grade(task: TaskConfig, form: Form | None, texts: list[RecordText], faults: Faults) -> None:
    """Runs a metric of the user's own on right answers: what fails here would fail after the training."""
    if task.grade is None:
        return
    for text in texts:
        try:
            graded(task.grade, _right_text(form, text), text.record)
        except MetricFault as fault:
            faults.add(f"record {text.number}", fault.message, fault.remedy)


def _evaluation_examples(
    task: TaskConfig, form: Form, texts: list[RecordText], tokenizer: PreTrainedTokenizerBase
) -> list[EvaluationExample]:
    last_answers = [replace(text, turns=text.turns[-1:]) for text in texts]
    examples = []
    sequences = tokenize(last_answers, tokenizer, form.templates.special_tokens, form.ends)
    rejected: Sequence[Example | None] = _rejected(texts, form, tokenizer) or [None] * len(texts)
    for (example,), text, other in zip(sequences, texts, rejected, strict=True):
        thinks = form.thinks(text.turns[-1][0])
        origin = (text.record, str(text.source), text.number) if task.grade is not None else ({}, "", 0)
        examples.append(EvaluationExample(example, text.expected, *origin, thinks, other))
    return examples
