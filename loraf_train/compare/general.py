"""Held-out general text, and the model's loss on it, whose increase is the drift of the base model.

A record has a field `text`, of which every token but the first counts, or one of the forms of training records
(`prompt` and `completion`, …), of which the completion and its end of sequence count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError
from loraf.prompt_ids import prompt_ids
from loraf_train.data.examples import EvaluationExample, Example
from loraf_train.data.form import RecordFault
from loraf_train.data.records import Faults, read
from loraf_train.data.task_data import load_task
from loraf_train.data.text import require_encodable
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, RecordSource
from loraf_train.settings.parts import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 2048  # tokens; a longer text is divided into pieces of this length


@dataclass(frozen=True)
class General:
    """The text as token ids; `tokens` is the number of those that the loss is taken on."""

    examples: list[EvaluationExample]
    tokens: int

    def loss(self, model: PreTrainedModel, on_progress: Callable[[int, int], None] = lambda done, total: None) -> float:
        """The mean loss in nats per token."""
        from loraf_train.scoring.evaluate import completion_loss

        return completion_loss(model, self.examples, lambda done: on_progress(done, len(self.examples)))


def general_text(source: RecordSource, tokenizer: PreTrainedTokenizerBase, context: int | None) -> General:
    """Reads and tokenizes general text.

    Args:
        context: the model's longest sequence, in tokens; None: no limit.

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
        data = DataConfig(train=(source,))
        task = TaskConfig(
            name="general", alpha=1.0, sparsity=0.5, data=data, training=TrainingConfig(max_length=longest)
        )
        examples = load_task(task, tokenizer, seed=0, read_source=lambda *_: records).train
    tokens = sum(len(e.input_ids) - max(1, e.prompt_length) for e in examples)
    return General([EvaluationExample(e, "") for e in examples], tokens)


def _texts(
    source: RecordSource, records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Example]:
    faults = Faults(str(source))
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("text"), str):
            faults.add(f"record {number}", "field 'text' is missing or not a string", "give every record a text")
            continue
        try:
            require_encodable(record["text"], "field 'text'")
        except RecordFault as fault:
            faults.add(f"record {number}", fault.message, fault.remedy)
    if faults.problems:
        raise ConfigError(faults.problems)
    examples = []
    for ids in prompt_ids(tokenizer, [record["text"] for record in records]):
        pieces = (ids[i : i + longest] for i in range(0, len(ids), longest))
        examples += [Example(piece, 0) for piece in pieces if len(piece) > 1]
    if not examples:
        faults.add("", "no text is two tokens or longer", "name a file with longer texts")
        raise ConfigError(faults.problems)
    return examples
