"""Reads the form that an answer must have. The backend tries it: that may take long, and would hold other requests."""

from __future__ import annotations

from loraf.errors import Problem
from loraf_serve import limits
from loraf_serve.backends.backend import StructuredOutput
from loraf_serve.request.json_text import NotJsonError, read_object
from loraf_serve.v1 import generation_pb2 as pb

FIELD = "sampling.structured_output"


def read(form: pb.StructuredOutput, problems: list[Problem]) -> StructuredOutput | None:
    """Returns the form; None after appending to `problems`."""
    kind = form.WhichOneof("form")
    if kind is None:
        remedy = "set json_schema, regex, choice or grammar, or leave structured_output out"
        problems.append(Problem("is empty", f"{FIELD}.form", remedy=remedy))
        return None
    if kind == "choice":
        return _choice(tuple(form.choice.texts), problems)
    text: str = getattr(form, kind)
    most = {"json_schema": limits.MAX_SCHEMA, "regex": limits.MAX_REGEX, "grammar": limits.MAX_GRAMMAR}[kind]
    message, remedy = "", ""
    if len(text) > most:
        message, remedy = f"has {len(text)} characters", f"use at most {most}"
    elif not text.strip():
        message, remedy = "is empty", "leave structured_output out for an answer of any form"
    elif "\0" in text:
        message, remedy = "has a null character", "leave it out"
    elif kind == "json_schema":
        try:
            read_object(text)
        except NotJsonError as error:
            message, remedy = str(error), "send a JSON schema, an object"
    if message:
        problems.append(Problem(message, f"{FIELD}.{kind}", remedy=remedy))
        return None
    return StructuredOutput(kind, text)


def _choice(texts: tuple[str, ...], problems: list[Problem]) -> StructuredOutput | None:
    field = f"{FIELD}.choice.texts"
    total, count = sum(map(len, texts)), len(texts)
    if not 0 < count <= limits.MAX_CHOICES:
        problems.append(Problem(f"has {count} texts", field, remedy=f"use 1 to {limits.MAX_CHOICES}"))
    elif total > limits.MAX_CHOICES_CHARACTERS:
        remedy = f"use at most {limits.MAX_CHOICES_CHARACTERS} together"
        problems.append(Problem(f"has {total} characters", field, remedy=remedy))
    else:
        seen: set[str] = set()
        wrong = []
        for i, text in enumerate(texts):
            if not text or "\0" in text:
                wrong.append(Problem("is empty or has a null character", f"{field}[{i}]", remedy="leave it out"))
            elif text in seen:
                wrong.append(Problem("is there twice", f"{field}[{i}]", remedy="name each text once"))
            seen.add(text)
        problems += wrong
        if not wrong:
            return StructuredOutput("choice", texts)
    return None
