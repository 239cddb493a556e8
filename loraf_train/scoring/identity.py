"""What a stored score is a score of: the evaluation and how it is scored, as one digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraf.files.sealed_json import content_digest
from loraf_train.grading import custom
from loraf_train.grading.builtin import DEFAULT_NEW_TOKENS, OWN_METRIC_NEW_TOKENS, PREFERENCE

if TYPE_CHECKING:
    from loraf_train.data.examples import EvaluationSet
    from loraf_train.settings.config import TaskConfig

_RULES = 1  # of scoring; a release that scores the same answers differently raises it


def answer_tokens(task: TaskConfig, metric: str) -> int:
    """Returns the largest number of tokens that an answer may have."""
    return task.max_new_tokens or DEFAULT_NEW_TOKENS.get(metric, OWN_METRIC_NEW_TOKENS)


def evaluation_digest(task: TaskConfig, metric: str, evaluation: EvaluationSet) -> str:
    """Returns the SHA-256 (hex) of all that a score depends on besides the model and its task set.

    That is every prompt and right answer as token ids and as text, the metric (of the user's own: its code), and for
    generated answers the choices and the largest number of tokens. Names and folders of files do not count.
    """
    content: dict[str, object] = {
        "rules": _RULES,
        "metric": metric,
        "examples": [
            [e.example.input_ids, e.example.prompt_length, e.example.silent, e.expected, e.thinks, _text(e.record)]
            for e in evaluation.examples
        ],
    }
    if metric == PREFERENCE:
        content["rejected"] = [
            [e.rejected.input_ids, e.rejected.prompt_length] for e in evaluation.examples if e.rejected is not None
        ]
    elif metric != "loss":
        content |= {"choices": evaluation.choices, "max_new_tokens": answer_tokens(task, metric)}
    if task.grade is not None:
        content["code"] = custom.code_digest(task.grade)
    return content_digest(content)


def _text(record: Mapping[str, object]) -> str:
    """A record as one text, the same for the same fields in another order."""
    return repr(sorted(record.items()))
