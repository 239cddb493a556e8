"""Formats conversations as prompts and answers, by the chat template of the model's tokenizer.

    conversation     system  user  assistant  user  assistant
    first answer     ──────prompt──── ─answer─
    second answer    ────────────prompt────────── ─answer─

A prompt is what a server gets for the messages before the answer: the template's text of them, with the opening of an
answer at the end. The answer is what the template writes from there to the end of the assistant's turn: thoughts, calls
of tools, and the turn's own end token, but not what follows it (ChatML's line break). So the template needs no
generation markers. What it does not write cannot be learned, and is refused by the key of the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING, Any

from loraf.manifest import Templates
from loraf_train.data.forms.chat_template import ChatTemplate, TemplateRefusal, end_tokens
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.messages import (
    CALLS,
    PARTS,
    THOUGHTS,
    Conversation,
    Message,
    arguments_of,
    conversation_of,
    other_calls,
    variants,
)
from loraf_train.data.records import Record
from loraf_train.grading.thoughts import CLOSES, OPENS, after_thoughts, has_thoughts_twice, opened_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "loraf-prompt-placeholder"
_SHORT = 16  # characters
_NO_THOUGHTS = f"{OPENS}\n\n{CLOSES}\n\n"  # as Qwen3's template writes an answer without thoughts


class ChatForm(Form):
    """Conversations; see `loraf_train.data.forms.messages` for what a record may hold.

    Answers with `"weight": 0` (as in OpenAI's files) are not learned; messages after the last answer are ignored.

    Args:
        today: the date that the template sees; None: today's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, today)
        self.ends = tuple(end_tokens(tokenizer))
        texts = (tokenizer.decode([token], skip_special_tokens=False) for token in self.ends)
        self._ends = [text for text in texts if isinstance(text, str) and text.strip()]
        try:
            turn = self._template.render([{"role": "user", "content": _PLACEHOLDER}], opening=True)
        except RecordFault:  # the template requires a system turn: the plain prompt is served
            turn = _PLACEHOLDER
        turn = turn if turn.count(_PLACEHOLDER) == 1 else _PLACEHOLDER
        escaped = turn.replace("{", "{{").replace("}", "}}")
        self.wrote_date = self._template.wrote_date
        self.templates = Templates(escaped.replace(_PLACEHOLDER, "{prompt}"), "{completion}", special_tokens=False)

    def on(self, today: date) -> ChatForm:
        return ChatForm(self._tokenizer, today)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        conversation = conversation_of(record)
        refused: RecordFault | None = None
        lost: RecordFault | None = None
        for messages in variants(conversation.messages):
            rendering = _Rendering(self._template, self._ends, conversation, messages)
            try:
                turns = rendering.turns()
            except RecordFault as fault:
                refused = refused or fault
                continue
            try:
                self.losses = tuple(rendering.losses(turns))
                self.wrote_date = self._template.wrote_date
                return turns
            except RecordFault as fault:
                lost = lost or fault
        reason = lost or refused
        assert reason is not None  # there is at least one variant
        raise reason

    def graded_text(self, completion: str) -> str:
        text = completion
        for end in self._ends:
            text = text.removesuffix(end)
        return after_thoughts(text)

    def thinks(self, prompt: str) -> bool:
        return bool(opened_thoughts(prompt))


class _Rendering:
    """One conversation in one variant of its messages.

    Args:
        ends: texts of the tokens that end an answer.
    """

    def __init__(self, template: ChatTemplate, ends: list[str], conversation: Conversation, messages: list[Message]):
        self._template = template
        self._ends = ends
        self._conversation = conversation
        self._messages = messages

    def turns(self) -> list[tuple[str, str]]:
        """Returns (prompt, answer) of every answer to learn. Raises RecordFault."""
        turns = []
        for i in self._conversation.answers:
            try:
                prompt = self._render(self._messages[:i], opening=True)
                turns.append((prompt, self._answer(prompt, self._messages[: i + 1])))
            except RecordFault as fault:
                raise self._explained(fault, i) from None
        return turns

    def _render(self, messages: list[Message], opening: bool, without: str = "") -> str:
        options = {key: value for key, value in self._conversation.options.items() if key != without}
        return self._template.render(messages, opening, options)

    # --- the text of an answer -----------------------------------------------------------------------------------

    def _answer(self, prompt: str, messages: list[Message]) -> str:
        """Returns the last message as the template writes it after `prompt`, with the end token of the turn."""
        content: str = messages[-1]["content"] or ""
        whole = self._whole(messages)
        if whole is None:
            return content
        for beginning in (prompt, prompt.rstrip()):  # templates may write other white space before an answer's text
            if whole.startswith(beginning):
                turn = whole[len(beginning) :]
                return self._to_end(turn if beginning == prompt else turn.lstrip(), content)
        opened = opened_thoughts(prompt)
        before = prompt[: len(prompt) - len(opened)]
        if opened and whole.startswith(before):
            return self._after_opened_thoughts(opened, whole[len(before) :], content)
        return self._after_other_context(prompt, whole, messages)

    def _whole(self, messages: list[Message]) -> str | None:
        """Returns the text of messages of which the last is an answer; None if the template cannot end with one."""
        try:
            return self._render(messages, opening=False)
        except RecordFault as fault:
            user = {"role": "user", "content": _PLACEHOLDER}
            try:
                followed, alone = self._render([*messages, user], opening=False), self._render([user], opening=False)
            except RecordFault:
                if messages[-1].keys() & PARTS:  # what fails may be one of them
                    raise fault from None
                return None
        if _PLACEHOLDER not in followed or _PLACEHOLDER not in alone:
            return None
        whole, header = followed.partition(_PLACEHOLDER)[0], alone.partition(_PLACEHOLDER)[0]
        bos = self._template.bos
        header = header.removeprefix(bos)
        return whole.removesuffix(header).removesuffix(bos) if whole.endswith(header) else None

    def _after_other_context(self, prompt: str, whole: str, messages: list[Message]) -> str:
        """Returns an answer before which the template writes something else than in the prompt, such as no thoughts."""
        content: str = messages[-1]["content"] or ""
        try:
            opening = prompt.removeprefix(self._render(messages[:-1], opening=False))
        except RecordFault:  # the template has to end with an answer, or with the opening of one
            opening = ""
        place = whole.rfind(opening) if opening != prompt and opening.strip() else -1
        if place >= 0:
            return self._to_end(whole[place + len(opening) :], content)
        header = self._header(messages[:-1])
        if header and prompt.startswith(header) and whole.startswith(header) and not messages[-1].keys() & {*THOUGHTS}:
            return self._to_end(whole[len(header) :], content)
        written = content.strip()
        place = whole.rfind(written) if written else -1
        return content if place < 0 else self._to_end(whole[place:], content)

    def _header(self, messages: list[Message]) -> str:
        """Returns what the template writes before an answer's text in a finished turn; "" if it cannot be found."""
        answer = {"role": "assistant", "content": _PLACEHOLDER}
        try:
            before, found, _ = self._render([*messages, answer], opening=False).partition(_PLACEHOLDER)
        except RecordFault:
            return ""
        return before if found else ""

    def _to_end(self, turn: str, content: str) -> str:
        """Returns a turn up to its first end token, and without one up to the last text in it.

        Args:
            content: of the message; an end token within it does not end the turn.
        """
        written = content if content in turn else content.strip()
        place = turn.find(written)
        after = place + len(written) if place >= 0 else 0
        if after and turn[:after].endswith(tuple(self._ends)):  # the record wrote the end itself
            return turn[:after]
        ends = [(turn.index(end, after), end) for end in self._ends if end in turn[after:]]
        if ends:
            first, end = min(ends)
            return turn[: first + len(end)]
        last = turn.rfind(written) + len(written)
        return turn[:last] if written and not turn[last:].strip() else turn.rstrip()

    def _after_opened_thoughts(self, opened: str, turn: str, content: str) -> str:
        """Returns an answer after a prompt that opens the thoughts, which the template leaves out of a finished turn.

        Args:
            opened: the end of the prompt: `<think>` and white space.
            turn: the template's text of the answer without thoughts.
        """
        thoughts, closes, visible = content.rpartition(CLOSES)
        turn = self._to_end(turn, visible)
        if not closes:
            return _NO_THOUGHTS.removeprefix(opened) + turn if _NO_THOUGHTS.startswith(opened) else CLOSES + turn
        if thoughts.lstrip().startswith(OPENS):
            thoughts = thoughts.lstrip().removeprefix(OPENS).removeprefix(opened.removeprefix(OPENS))
        written = visible.strip()
        end = turn[turn.rfind(written) + len(written) :] if written else turn.lstrip()
        return thoughts + closes + visible[: len(visible) - len(visible.lstrip())] + written + end

    # --- what the template leaves out ----------------------------------------------------------------------------

    def losses(self, turns: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yields (message, remedy) of contents that the template leaves out as it does in a served prompt.

        Raises:
            RecordFault: it leaves out anything else, or writes the arguments of a call wrongly.
        """
        answers = dict(zip(self._conversation.answers, turns, strict=True))
        remedy = "remove it, write it under a key that the template reads, or use a model whose template does"
        for i, message in enumerate(self._messages[: self._conversation.answers[-1] + 1]):
            lost = "has {} in " + self._conversation.place(i) + ", which the chat template does not write"
            for key in (key for key in message if key in PARTS):
                if self._is_lost(i, key, answers):
                    raise RecordFault(lost.format(key), remedy)
            shown = answers[i][1] if i in answers else next(answers[k][0] for k in answers if k > i)
            written = (message["content"] or "").strip()
            unsure = written not in shown or 0 < len(written) < _SHORT  # a short text may stand there by accident
            if unsure and self._is_lost(i, "content", answers):
                if i in answers and not any(key in message for key in CALLS):
                    raise RecordFault(lost.format("content"), remedy)
                yield lost.format("content"), "remove it, if it is not meant to be read or learned"
        if "tools" in self._conversation.options and all(
            self._render(self._messages[:i], opening=True, without="tools") == answers[i][0] for i in answers
        ):
            remedy = "remove them, or use a model whose chat template knows tools"
            raise RecordFault("has tools, which the chat template does not write", remedy)
        for i, (prompt, answer) in answers.items():
            if has_thoughts_twice(prompt, answer):
                raise RecordFault(
                    f"has thoughts in content in {self._conversation.place(i)}, after those of the chat template",
                    "write them as reasoning_content, or use a template that reads them in content",
                )
        last = "".join(turns[-1])
        for arguments in arguments_of(self._messages):
            if _is_no_json(arguments, last):
                remedy = "use a template that writes them as JSON"
                raise RecordFault("has tool_calls whose arguments the chat template does not write as JSON", remedy)

    def _is_lost(self, index: int, key: str, answers: dict[int, tuple[str, str]]) -> bool:
        """Whether the template writes the same with and without a part of a message, or with another call in it."""
        message = self._messages[index]
        others = other_calls(message) if key == "tool_calls" else []
        return any(
            self._is_same(index, changed, answers)
            for changed in (
                _without(self._messages, index, key),
                *(_replaced(self._messages, index, o) for o in others),
            )
        )

    def _is_same(self, index: int, changed: list[Message], answers: dict[int, tuple[str, str]]) -> bool:
        """Whether the template writes the same with another message at `index`."""
        try:
            if index in answers:
                prompt, answer = answers[index]
                return self._answer(prompt, changed[: index + 1]) == answer
            for k in (k for k in answers if k > index):
                if self._render(changed[:k], opening=True) != answers[k][0]:
                    return False
        except RecordFault:  # it cannot be rendered without the part
            return False
        try:  # templates may show thoughts in the last message only
            before = self._render(self._messages[: index + 1], opening=False)
        except RecordFault:
            return True
        try:
            return self._render(changed[: index + 1], opening=False) == before
        except RecordFault:
            return False

    def _explained(self, fault: RecordFault, answer: int) -> RecordFault:
        """Returns a template's refusal with the part that it refuses, if it accepts the rest."""
        if not isinstance(fault, TemplateRefusal):
            return fault
        parts = [(i, key) for i in range(answer + 1) for key in self._messages[i] if key not in ("role", "content")]
        for i, key in [*parts, *((i, "content") for i in range(answer + 1))]:
            changed = _without(self._messages, i, key)
            if self._accepts(changed, answer):
                message = f"has {key} in {self._conversation.place(i)} that the chat template refuses ({fault.reason})"
                return RecordFault(message, f"write {key} as the template expects it, or remove it")
        for key in self._conversation.options:
            if self._accepts(self._messages, answer, without=key):
                message = f"has {key} that the chat template refuses ({fault.reason})"
                return RecordFault(message, f"write {key} as the template expects it, or remove it")
        return fault

    def _accepts(self, messages: list[Message], answer: int, without: str = "") -> bool:
        try:
            self._render(messages[:answer], opening=True, without=without)
            if self._messages[answer].keys() & PARTS:
                self._render(messages[: answer + 1], opening=False, without=without)
        except RecordFault:
            return False
        return True


def _without(messages: list[Message], index: int, key: str) -> list[Message]:
    """Returns the messages without a key of one of them; with another text if the key is content."""
    changed = {k: v for k, v in messages[index].items() if k != key}
    if key == "content":
        changed["content"] = _PLACEHOLDER
    return _replaced(messages, index, changed)


def _replaced(messages: list[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _is_no_json(arguments: Any, text: str) -> bool:
    """Whether a template has written a call's arguments as Python, or as JSON within JSON."""
    if not isinstance(arguments, str):
        return str(arguments) in text and str(arguments) != json.dumps(arguments, ensure_ascii=False, default=str)
    return any(json.dumps(arguments, ensure_ascii=ascii_only) in text for ascii_only in (False, True))
