"""Training examples that are read while they are trained on, so that memory does not grow with the file.

    sources, one after the other, again and again → shuffled through a buffer → text → token ids → cut to max_length

A pass through the sources goes in the files' order, shuffled only within a buffer of BUFFER records: each record that
is drawn from it makes room for the next one. Which one is drawn depends on the seed and the number of the pass alone.
So an interrupted training goes on where it was, by reading up to there again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, overload

from loraf.errors import ConfigError, Problem
from loraf_train.data import records
from loraf_train.data.cutting import cut
from loraf_train.data.examples import Example, RecordText, tokenize
from loraf_train.data.forms.form import Form
from loraf_train.data.record_texts import texts_of
from loraf_train.data.records import Faults, Record
from loraf_train.settings.data import RecordSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = 1000  # records that are read before anything is trained
BUFFER = 1000  # records among which the next one is drawn
_AT_ONCE = 64  # records that are tokenized together
_REMEMBERED = 8  # digests of what was read up to the last steps

Numbered = tuple[RecordSource, int, Record]  # source, number in it from 1, record


@dataclass(frozen=True)
class Limits:
    """What the model can read.

    Attributes:
        vocabulary: rows of its embedding.
        positions: longest sequence, in tokens; None: there is no limit.
    """

    vocabulary: int
    positions: int | None


@dataclass(frozen=True)
class ExampleStream(Sequence[Example]):
    """The training examples of a task that streams. As a sequence, it holds those of the first HEAD records.

    Attributes:
        head: these examples; `check` reads them, and statistics for retention are gathered from them.
        task: its name, for messages.
    """

    head: list[Example]
    task: str
    sources: tuple[RecordSource, ...]
    form: Form = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    max_length: int

    def __len__(self) -> int:
        return len(self.head)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self.head[index]

    @property
    def identity(self) -> tuple[str, ...]:
        """What identifies the records besides the head, without reading them: the size of each file."""
        return tuple(str(source.file.stat().st_size) if source.file else str(source) for source in self.sources)

    def drawn(self, seed: int, number: int, batch: int, limits: Limits) -> DrawnExamples:
        """Returns the first examples that a phase trains on.

        Args:
            seed: determines the order.
            number: of examples.
            batch: examples of a step.
            limits: what cannot be read is a mistake.
        """
        return DrawnExamples(self, seed, number, batch, limits)

    def digest_of_first(self, seed: int, number: int, limits: Limits) -> bytes:
        """Returns the SHA-256 of the first examples that a phase trains on, which are read for it."""
        drawn = self.drawn(seed, number, number, limits)
        drawn[number - 1]
        return drawn.digests[number]

    def passes(self, seed: int, limits: Limits) -> Iterator[Example]:
        """Yields examples without end.

        Raises:
            ConfigError: a record cannot be read, become text, or be read by the model; or a whole pass has nothing to
                learn.
        """
        for number in count():
            chance = random.Random(f"{seed}/{number}")
            learned = False
            for example in self._one_pass(_shuffled(_numbered(self.sources), chance), limits):
                learned = True
                yield example
            if not learned:
                message = f"no record of task {self.task!r} has anything to learn within max_length {self.max_length}"
                raise ConfigError(Problem(message, "training.max_length", remedy="set it to more tokens"))

    def _one_pass(self, numbered: Iterator[Numbered], limits: Limits) -> Iterator[Example]:
        while chunk := list(islice(numbered, _AT_ONCE)):
            texts = [text for entry in chunk for text in self._text(*entry)]
            sequences = tokenize(texts, self.tokenizer, self.form.templates.special_tokens, self.form.ends)
            for text, of_record in zip(texts, sequences, strict=True):
                for example in cut([of_record], [text], self.max_length).kept:
                    _require_readable(example, text, limits)
                    yield example

    def _text(self, source: RecordSource, number: int, record: Record) -> list[RecordText]:
        faults, doubts = Faults(str(source)), Faults(str(source), "warnings")
        texts = texts_of(self.form, source, [(number, record)], faults, doubts)
        if faults.problems:
            raise ConfigError(faults.problems)
        return texts


class DrawnExamples(Sequence[Example]):
    """The examples of one phase, read as they are asked for. Indices have to ascend.

    Attributes:
        digests: examples read so far → SHA-256 of them, for the last few steps.
    """

    def __init__(self, stream: ExampleStream, seed: int, number: int, batch: int, limits: Limits):
        self._number = number
        self._batch = batch
        self._examples = stream.passes(seed, limits)
        self._read = 0
        self._digest = hashlib.sha256()
        self._expected: tuple[int, bytes] | None = None
        self._task = stream.task
        self.digests: dict[int, bytes] = {}

    def expect(self, number: int, digest: bytes) -> None:
        """Lets reading fail if the digest of the first `number` examples is another."""
        self._expected = number, digest

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._number))]
        if not 0 <= index < self._number:
            raise IndexError(index)  # which ends an iteration
        if index < self._read:
            raise RuntimeError(f"example {index} was asked for after example {self._read - 1}")
        example = self._next()
        while self._read <= index:
            example = self._next()
        return example

    def _next(self) -> Example:
        example = next(self._examples)
        self._read += 1
        self._digest.update(repr(example).encode())
        if self._read % self._batch == 0:
            self.digests[self._read] = self._digest.digest()
            if len(self.digests) > _REMEMBERED:
                del self.digests[next(iter(self.digests))]
        number, digest = self._expected or (0, b"")
        if number == self._read and digest != self._digest.digest():
            raise have_changed(self._task)
        return example


def have_changed(task: str) -> ConfigError:
    """What is raised if a task goes on, and the records that it had read are others."""
    message = f"task {task!r} was interrupted, and the records that it had read until then have changed"
    remedy = "restore them, or delete the folder .resume in the checkpoint's to begin the task again"
    return ConfigError(Problem(message, "data.train", remedy=remedy))


def read_head(sources: Sequence[RecordSource], problems: list[Problem]) -> list[tuple[RecordSource, list[Record]]]:
    """Returns the first HEAD records of all sources together, and the first one of every later source.

    Each source that can be read is returned with at least one record; what is wrong with the others is appended to
    `problems`.
    """
    heads: list[tuple[RecordSource, list[Record]]] = []
    for source in sources:
        room = max(1, HEAD - sum(len(part) for _, part in heads))
        try:
            part = list(islice(records.stream(source), room))
        except ConfigError as error:
            problems += error.problems
            continue
        if part:
            heads.append((source, part))
        else:
            problems.append(Problem("has no records", "", str(source), "name a file with records"))
    return heads


def _numbered(sources: Sequence[RecordSource]) -> Iterator[Numbered]:
    for source in sources:
        for number, record in enumerate(records.stream(source), 1):
            yield source, number, record


def _shuffled(entries: Iterator[Numbered], chance: random.Random) -> Iterator[Numbered]:
    """Yields all entries; each is drawn from a buffer that the following ones fill up again."""
    buffer = list(islice(entries, BUFFER))
    for entry in entries:
        i = chance.randrange(len(buffer))
        yield buffer[i]
        buffer[i] = entry
    chance.shuffle(buffer)
    yield from buffer


def _require_readable(example: Example, text: RecordText, limits: Limits) -> None:
    highest, length = max(example.input_ids), len(example.input_ids)
    where = f"record {text.number}", str(text.source)
    if highest >= limits.vocabulary:
        message = f"has a token with id {highest}, but the model's embedding has {limits.vocabulary} rows"
        raise ConfigError(Problem(message, *where, "use the tokenizer that belongs to the model"))
    if limits.positions is not None and length > limits.positions:
        message = f"has {length} tokens, but the model has {limits.positions} positions and no more"
        raise ConfigError(Problem(message, *where, f"set training.max_length to {limits.positions} or less"))
