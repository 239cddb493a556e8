"""General text: what the base model can do without any task, to protect it or to measure how far it drifts.

A record has a field `text`, of which every token but the first counts, or one of the forms of training records
(`prompt` and `completion`, …), of which the completion and its end of sequence count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError
from loraf.prompt_ids import prompt_ids
from loraf_train.data.examples import Example
from loraf_train.data.forms.form import RecordFault
from loraf_train.data.forms.text import require_encodable
from loraf_train.data.records import Faults, read
from loraf_train.data.task_data import load_task
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, RecordSource
from loraf_train.settings.parts import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def general_examples(
    source: RecordSource, tokenizer: PreTrainedTokenizerBase, longest: int, split: str = "train"
) -> list[Example]:
    """Reads and tokenizes general text.

    Args:
        longest: tokens of an example. A longer text is divided; a longer completion loses its end.
        split: of a Hugging Face dataset, if the source does not name one.

    Raises:
        ConfigError: see `records.read` and `data.load_task`; no record has two tokens.
    """
    records = read(source, split)
    if "text" in records[0]:
        return _texts(source, records, tokenizer, longest)
    data = DataConfig(train=(source,))
    task = TaskConfig(name="general", alpha=1.0, sparsity=0.5, data=data, training=TrainingConfig(max_length=longest))
    return list(load_task(task, tokenizer, seed=0, read_source=lambda *_: records).train)


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
