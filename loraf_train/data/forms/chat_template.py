"""Renders conversations by the chat template of a model's tokenizer, always on the same date."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import one_line
from loraf_train.data.forms.form import RecordFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateRefusal(RecordFault):
    """A conversation that the chat template refuses, or on which it fails, for the reason that it gives."""

    def __init__(self, reason: str):
        super().__init__(f"is refused by the chat template ({reason})", "fix the order of its roles")
        self.reason = reason


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        bos: the token that begins a text; "": there is none.
        wrote_date: whether the template has asked for the date so far.

    Args:
        today: the date that the template sees, at midnight: a template that writes the time of day still gives the
            same text all day, and in every process of a run. None: today's.

    Raises:
        RecordFault: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None):
        if not tokenizer.chat_template:
            message = "has messages, but the model's tokenizer has no chat template"
            raise RecordFault(message, "use an instruct model, or records with prompt and completion")
        self._tokenizer = tokenizer
        self.bos = str(tokenizer.bos_token or "")
        self._now = datetime.combine(today or date.today(), time())
        self.wrote_date = False

    def render(
        self, messages: Sequence[Mapping[str, Any]], opening: bool, options: Mapping[str, Any] | None = None
    ) -> str:
        """Returns messages as text, with all special tokens.

        Args:
            opening: whether to end with the opening of an answer of the assistant.
            options: further arguments of the template, such as `tools`.

        Raises:
            TemplateRefusal: the template refuses the messages, or fails on them.
        """
        conversation = [dict(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=opening,
                strftime_now=self._strftime_now,
                **(options or {}),
            )
        except Exception as error:  # a template is a program: on messages that it does not expect anything may fail
            raise TemplateRefusal(one_line(error)) from None
        assert isinstance(text, str)  # token ids only with tokenize=True
        return text

    def _strftime_now(self, form: str) -> str:
        """Takes the place of the function of this name that transformers gives to templates."""
        self.wrote_date = True
        return self._now.strftime(form)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end an answer: the tokenizer's end of sequence, then those of the model in its folder.

    They are those at which `generate` and servers stop: of generation_config.json, or without one of config.json. Files
    that cannot be read have none here; loading the model reports them.
    """
    folder = Path(tokenizer.name_or_path)
    configured: object = None
    for name in ("generation_config.json", "config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            configured = content.get("eos_token_id")
            break
    more = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0))
