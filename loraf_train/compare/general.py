"""Held-out general text, and the model's loss on it, whose increase is the drift of the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf_train.data.examples import EvaluationExample
from loraf_train.data.general import general_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf_train.settings.data import RecordSource

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
        ConfigError: see `data.general.general_examples`.
    """
    examples = general_examples(source, tokenizer, min(LONGEST, context or LONGEST), split="test")
    tokens = sum(len(e.input_ids) - max(1, e.prompt_length) for e in examples)
    return General([EvaluationExample(e, "") for e in examples], tokens)
