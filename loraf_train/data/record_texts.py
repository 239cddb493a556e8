"""Turns records into prompts and completions by a form, and collects what is wrong with those that cannot."""

from __future__ import annotations

from collections.abc import Sequence

from loraf_train.data.examples import RecordText
from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.text import require_encodable, require_readable
from loraf_train.data.preferences import PreferenceForm
from loraf_train.data.records import Faults, Record
from loraf_train.settings.data import RecordSource

CONVERSATION_FIELDS = frozenset(
    {"messages", "prompt", "completion", "tools", "chat_template_kwargs", "chosen", "rejected"}
)
NumberedRecord = tuple[int, Record]  # number in its source, from 1


def texts_of(
    form: Form, source: RecordSource, records: Sequence[NumberedRecord], faults: Faults, doubts: Faults
) -> list[RecordText]:
    """Formats records; those that cannot become text are added to `faults`, those that do in part to `doubts`."""
    texts = []
    for number, record in records:
        try:
            if isinstance(form, ChatForm | PreferenceForm):
                for name in CONVERSATION_FIELDS & record.keys():
                    require_readable(record[name], name)
            turns = form.texts(record)
            rejected = form.rejected_texts(record) if isinstance(form, PreferenceForm) else []
            for prompt, completion in (*turns, *rejected):
                require_encodable(prompt, "its prompt")
                require_encodable(completion, "its completion")
            texts.append(RecordText(turns, "", source, number, record, rejected))
            for loss in form.losses:
                doubts.add(f"record {number}", *loss)
        except RecordFault as fault:
            faults.add(f"record {number}", fault.message, fault.remedy)
    return texts
