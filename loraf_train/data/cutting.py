"""Cuts examples to max_length. An example whose rest has nothing to learn is dropped: its loss would be NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraf.errors import Problem
from loraf_train.data.examples import Example, RecordText


@dataclass(frozen=True)
class Cut:
    """Examples of at most max_length tokens.

    Attributes:
        kept: those with something to learn, in order.
        shortened: how many of them lost their end.
        dropped: the others, whole, each with the record that it is from.
        longest: tokens of the longest example before any was cut.
    """

    kept: list[Example]
    shortened: int
    dropped: list[tuple[Example, RecordText]]
    longest: int

    @property
    def first_dropped(self) -> str:
        """The place of the first dropped example; empty if there is none."""
        if not self.dropped:
            return ""
        text = self.dropped[0][1]
        return f"record {text.number} of {text.source}"


def cut(sequences: Sequence[Sequence[Example]], texts: Sequence[RecordText], max_length: int) -> Cut:
    """Cuts the examples of each record.

    Args:
        sequences: of each record, as `examples.tokenize` returns them.
        texts: the records.
        max_length: in tokens.
    """
    examples = [(example, text) for part, text in zip(sequences, texts, strict=True) for example in part]
    whole = [example for example, _ in examples if first_learned(example) < max_length]
    return Cut(
        kept=[replace(example, input_ids=example.input_ids[:max_length]) for example in whole],
        shortened=sum(len(example.input_ids) > max_length for example in whole),
        dropped=[(example, text) for example, text in examples if first_learned(example) >= max_length],
        longest=max((len(example.input_ids) for example, _ in examples), default=0),
    )


def first_learned(example: Example) -> int:
    """Returns the place of the first token that the loss is taken on; the number of tokens if there is none."""
    place = max(1, example.prompt_length)
    for begin, end in example.silent:
        if begin > place:
            break
        place = max(place, end)
    return min(place, len(example.input_ids))


def nothing_kept(dropped: Sequence[tuple[Example, RecordText]], task: str, max_length: int) -> Problem:
    """The problem of a task of which every example is dropped."""
    shortest, text = min(dropped, key=lambda pair: first_learned(pair[0]))
    prompts = all(example.prompt_length >= max_length for example, _ in dropped)
    message = (
        f"{'every prompt' if prompts else 'what comes before the first token to learn'} of task {task!r} "
        f"fills max_length {max_length}: all {len(dropped)} examples would be dropped"
    )
    remedy = (
        f"set max_length to at least {first_learned(shortest) + 1}, one more than what comes before "
        f"the first token to learn of record {text.number}"
    )
    return Problem(message, "training.max_length", str(text.source), remedy)
