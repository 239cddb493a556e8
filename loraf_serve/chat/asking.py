"""One question under one task set, in the first form that the server takes.

    chat       every turn so far, through the model's chat template
    template   the question alone, in the template that the one selected task was trained with
    prompt     the question alone, as it is

A base model often has no chat template, and a template belongs to one task. The server says so before it generates
anything; then the next form is tried, and remembered for that set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraf_serve.chat.sets import ChosenSet
from loraf_serve.client import Answer, AsyncClient, InvalidArgument

CHAT, TEMPLATE, PROMPT = "chat", "template", "prompt"
# Form → its field of the request, the beginning of the refusal that leads to the next form, and that form.
_REFUSALS = {
    CHAT: ("messages", "the model has no chat template", TEMPLATE),
    TEMPLATE: ("apply_task_template", "", PROMPT),
}
_ALONE = "the model has no chat template: this question is sent without earlier turns and instructions"


class Asker:
    """Sends questions, all with the same adapter and sampling.

    Args:
        request: arguments of `request_of`: adapter and sampling.
    """

    def __init__(self, client: AsyncClient, request: Mapping[str, Any]):
        self._client = client
        self._request = request
        self._forms: dict[str, tuple[str, str]] = {}  # set → form, and why it is this one

    async def ask(
        self,
        chosen: ChosenSet,
        messages: Sequence[Mapping[str, str]],
        show: Callable[[str], None],
        note: Callable[[str], None],
    ) -> Answer:
        """Streams one answer.

        Args:
            messages: the turns so far; the last one is the question.
            show: is called with each piece of the answer.
            note: is called before the first piece if the question is not sent as a chat, and says how it is sent.

        Raises:
            ServiceError: the server refused the question, failed, or cannot be reached.
            TypeError, ValueError: a sampling option is out of its field's range.
        """
        while True:
            form, reason = self._forms.get(chosen.text, (CHAT, ""))
            stream = self._client.stream(**self._request, **chosen.arguments, **_input(form, messages))
            started = False
            try:
                async for piece in stream:
                    if not started and form != CHAT:
                        note(reason)
                    started = True
                    if piece.index == 0:
                        show(piece.text)
                return await stream.answer()
            except InvalidArgument as error:
                following = None if started else _next_form(form, error)
                if following is None:
                    raise
                self._forms[chosen.text] = following
            finally:
                await stream.aclose()


def _input(form: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    if form == CHAT:
        return {"messages": messages}
    return {"prompt": messages[-1]["content"], "apply_task_template": form == TEMPLATE}


def _next_form(form: str, error: InvalidArgument) -> tuple[str, str] | None:
    """The form to try after a refusal, and what to tell of it; None if another form would not help."""
    if form not in _REFUSALS or len(error.violations) != 1:
        return None
    field, beginning, following = _REFUSALS[form]
    (refused, description) = error.violations[0]
    if refused != field or not description.startswith(beginning):
        return None
    if following == TEMPLATE:
        return following, f"{_ALONE}, in the template of its task"
    return following, f"{_ALONE}, as a plain prompt: a template {description.partition(' → ')[0]}"
