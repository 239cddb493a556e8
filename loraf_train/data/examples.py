"""Token ids with a loss mask: from the prompts and completions of records to training and evaluation examples.

A prompt is tokenized alone, by the function that a server uses (loraf.prompt_ids), so that training and serving see the
same tokens. The completion is tokenized as a continuation: no token spans the border, even where the tokenizer would
merge there, and no space is added before its first word. An end-of-sequence token is appended and learned, unless the
completion ends a conversation's turn with an end token of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf.prompt_ids import prompt_ids
from loraf_train.data.records import Record
from loraf_train.grading.thoughts import after_thoughts
from loraf_train.settings.data import RecordSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses skip
_LINE_BREAK = "\n"  # what a completion is tokenized after


@dataclass(frozen=True)
class Example:
    """One sequence. The loss is taken on input_ids[prompt_length:], end of sequence included, except in `silent`.

    Resume states store a digest of its repr, so names and order of the fields must not change.

    Attributes:
        silent: further parts [begin, end) without loss, ascending: the other turns between the assistant's answers.
    """

    input_ids: list[int]
    prompt_length: int
    silent: tuple[tuple[int, int], ...] = ()

    def labels(self) -> list[int]:
        """Returns one label per token, IGNORED where there is no loss. The first token is never predicted."""
        begin = max(1, self.prompt_length)
        labels = [IGNORED] * begin + self.input_ids[begin:]
        for start, end in self.silent:
            labels[start:end] = [IGNORED] * len(labels[start:end])
        return labels


@dataclass(frozen=True)
class EvaluationExample:
    """A prompt to answer: the whole sequence, never cut, and the right answer in the form that `is_right` expects.

    Of a conversation, the prompt ends before the assistant's last answer.

    Attributes:
        record: what it was read from, number `number` (from 1) of `source`; only set for a metric of the user's own.
        rejected: the other answer, of a preference; None: it is none.
        thinks: whether the prompt opens the thoughts of an answer; None: it is no prompt of a conversation, so an
            answer is graded whole.
    """

    example: Example
    expected: str
    record: Record = field(default_factory=dict)
    source: str = ""
    number: int = 0
    thinks: bool | None = field(default=None, repr=False)  # digests of evaluation sets are of their repr
    rejected: Example | None = field(default=None, repr=False)

    @property
    def prompt_ids(self) -> list[int]:
        return self.example.input_ids[: self.example.prompt_length]

    def graded_text(self, answer: str) -> str:
        """Returns the part of an answer's text that is graded: in a conversation, what follows the thoughts."""
        return answer if self.thinks is None else after_thoughts(answer, self.thinks)


@dataclass(frozen=True)
class EvaluationSet:
    """Named evaluation examples of a task; `choices` are the answers that the metric `choice` looks for."""

    name: str
    examples: list[EvaluationExample]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordText:
    """A record as text.

    Attributes:
        turns: (prompt, completion) of each answer.
        expected: the right answer in the metric's form; empty for training records.
        number: place in `source`, from 1.
        rejected: of a preference, (prompt, the answer that is not preferred).
    """

    turns: list[tuple[str, str]]
    expected: str
    source: RecordSource
    number: int
    record: Record
    rejected: list[tuple[str, str]] = field(default_factory=list)


def tokenize(
    texts: Sequence[RecordText],
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: bool = True,
    ends: Sequence[int] = (),
) -> list[list[Example]]:
    """Returns the sequences of each record, at full length.

    The answers of a conversation share one sequence as long as the tokens of each prompt begin with the sequence so
    far. Where they do not (a template that removes thoughts from earlier answers, tokens that merge across a border), a
    new sequence begins, so that every answer is learned after exactly the tokens that a server would put before it.

    Args:
        special_tokens: see `loraf.manifest.Templates`.
        ends: see `loraf_train.data.forms.form.Form`.

    Raises:
        ConfigError: a prompt has no token, so that no answer could begin.
    """
    turns = [turn for text in texts for turn in text.turns]
    prompts = iter(prompt_ids(tokenizer, [prompt for prompt, _ in turns], special_tokens))
    completions = iter(_completion_ids(tokenizer, [completion for _, completion in turns]))
    examples = []
    empty: list[RecordText] = []
    for text in texts:
        ids = [(next(prompts), next(completions)) for _ in text.turns]
        if not all(prompt for prompt, _ in ids):
            empty.append(text)
        else:
            examples.append(_sequences(ids, tokenizer.eos_token_id, ends))
    if empty:
        more = f" (and that of {len(empty) - 1} more records)" if len(empty) > 1 else ""
        message = f"its prompt{more} is empty, and the tokenizer adds no token at the beginning"
        remedy = "give every record a prompt, or use a model whose tokenizer begins with a BOS"
        raise ConfigError(Problem(message, f"record {empty[0].number}", str(empty[0].source), remedy))
    return examples


def _sequences(
    turns: Iterable[tuple[list[int], list[int]]], eos: int | None, ends: Sequence[int] = ()
) -> list[Example]:
    """Joins the (prompt, completion) ids of a record's answers, in order, into sequences; see `tokenize`."""
    examples: list[Example] = []
    ids: list[int] = []
    prompt_length = 0
    silent: list[tuple[int, int]] = []
    ended = False  # whether the last completion has its end
    enders = {*ends} | ({eos} if eos is not None else set())

    def close() -> None:
        ending = [] if eos is None or ended else [eos]
        examples.append(Example([*ids, *ending], prompt_length, tuple(silent)))

    for prompt, completion in turns:
        if ids and prompt[: len(ids)] == ids:
            end_follows = not ended and not enders.isdisjoint(prompt[len(ids) : len(ids) + 1])
            silent.append((len(ids) + end_follows, len(prompt)))
        else:
            if ids:
                close()
            prompt_length, silent = len(prompt), []
        ids = [*prompt, *completion]
        ended = bool(completion) and completion[-1] in enders
    close()
    return examples


def _completion_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes texts as continuations.

    SentencePiece tokenizers (Mistral's, Llama 2's) add a space before every text. So each text is tokenized after a
    line break, whose ids are removed again. A text that would merge with the line break is tokenized alone.
    """
    if not texts:
        return []

    def tokenized(parts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    (before,) = tokenized([_LINE_BREAK])
    with_break = tokenized([_LINE_BREAK + text for text in texts])
    merged = [i for i, ids in enumerate(with_break) if ids[: len(before)] != before]
    completions = [list(ids[len(before) :]) for ids in with_break]
    for i, ids in zip(merged, tokenized([texts[i] for i in merged]) if merged else [], strict=True):
        completions[i] = list(ids)
    return completions


def digest_of(examples: Sequence[object]) -> str:
    """Returns the SHA-256 (hex) of the examples in order: of their `repr`, so of class and field names too.

    Of a stream, it is of the examples that were read before the training, and of what else identifies the records.
    """
    digest = hashlib.sha256()
    for text in getattr(examples, "identity", ()):
        digest.update(text.encode())
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()
