"""Held-out general text, and the model's loss on it: how far training has moved the base away from what it knew.

Records hold `text`, and every token but the first counts; or they have one of the forms of training records
(`prompt` and `completion`, …), and the completion counts with its end of sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf.errors import ConfigError
from loraf.prompt_ids import prompt_ids
from loraf_train.data.examples import EvaluationExample, Example, load_task
from loraf_train.data.records import Faults, read
from loraf_train.settings.config import DataConfig, TaskConfig
from loraf_train.settings.parts import Source, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 2048  # tokens of a piece that a longer text is divided into


@dataclass(frozen=True)
class General:
    """The text as token ids. `tokens`: those that the loss is taken on."""

    examples: list[EvaluationExample]
    tokens: int

    def loss(self, model: PreTrainedModel, on_progress: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Nats a token."""
        from loraf_train.scoring.evaluate import completion_loss

        return completion_loss(model, self.examples, lambda done: on_progress(done, len(self.examples)))


def general_text(source: Source, tokenizer: PreTrainedTokenizerBase, context: int | None) -> General:
    """Reads and tokenizes it.

    Args:
        context: longest sequence of the model, in tokens; None: it has no limit.

    Raises:
        ConfigError: see `records.read` and `data.load_task`; no record has two tokens.
    """
    if source.dataset is not None:
        source = source.model_copy(update={"split": source.split or "test"})
    longest = min(LONGEST, context or LONGEST)
    records = read(source)
    if "text" in records[0]:
        examples = _texts(source, records, tokenizer, longest)
    else:
        whole = DataConfig(train=(source,))
        task = TaskConfig(
            name="general", alpha=1.0, sparsity=0.5, data=whole, training=TrainingConfig(max_length=longest)
        )
        examples = load_task(task, tokenizer, seed=0).train
    tokens = sum(len(e.input_ids) - max(1, e.prompt_length) for e in examples)
    return General([EvaluationExample(e, "") for e in examples], tokens)


def _texts(source: Source, records: list[dict], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Example]:
    faults = Faults(str(source))
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("text"), str):
            faults.add(f"record {number}", "has no text in its field 'text'", "give every record a text")
    if faults.problems:
        raise ConfigError(faults.problems)
    examples = []
    for ids in prompt_ids(tokenizer, [record["text"] for record in records]):
        pieces = (ids[i : i + longest] for i in range(0, len(ids), longest))
        examples += [Example(piece, 0) for piece in pieces if len(piece) > 1]
    if not examples:
        faults.add("", "no text has two tokens", "name a file with longer texts")
        raise ConfigError(faults.problems)
    return examples
