"""Log lines for people or for machines, and a line for each call.

Whatever a client writes into a request stays within its own line: control characters are escaped, also those that
reorder text on a terminal. Every line that is logged while a call is answered has the call's request id.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import unicodedata
from pathlib import Path
from typing import IO, Any

from loraf_serve.observe.call import CURRENT, Call, Observer

MAX_TEXT = 20_000  # characters of a prompt or an answer in the log

log = logging.getLogger("loraf_serve.calls")
_VLLM_LOGGING = Path(__file__).with_name("vllm_logging.json")
_FIELDS = "fields"  # attribute of a record
_PLAIN = re.compile(r"[\w./:+@-]+", re.ASCII)  # a value that needs no quotes
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: control and format characters, other line ends


def configure(log_format: str = "text", stream: IO[str] | None = None) -> None:
    """Sends everything that this process logs to `stream`, standard error by default.

    Args:
        log_format: "text" or "json".
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def configure_vllm() -> None:
    """Makes vLLM log as JSON, in this process and in those that it starts, unless the user has configured its logs.
    To be called before vLLM is imported."""
    if os.environ.get("VLLM_CONFIGURE_LOGGING") != "0":
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(_VLLM_LOGGING))


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO loraf_serve.calls: message key=value`; a traceback follows on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        when = f"{self.formatTime(record)} {record.levelname} {record.name}"
        line = f"{when}: {escaped(record.getMessage())}{fields}"
        for trace_line in _traceback(self, record).splitlines():
            line += f"\n    {escaped(trace_line)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of a call."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if traceback := _traceback(self, record):
            line["traceback"] = traceback
        return json.dumps(line)  # in ASCII: everything else is escaped


class LogObserver(Observer):
    """Logs a line when a call ends. Texts are in it only if the service has put them into the call."""

    def ended(self, call: Call) -> None:
        log.info("%s %s", call.name, call.code, extra={_FIELDS: call_fields(call)})


def call_fields(call: Call) -> dict[str, Any]:
    """What the log tells of a call that has ended; without what the call does not have. Times are in seconds."""
    fields: dict[str, Any] = {
        "request_id": call.request_id,
        "method": call.method,
        "code": call.code,
        "client": call.client,
        "adapter": call.adapter,
        "task_set": call.task_set,
        "seconds": _between(call.began, call.ended),
        "seconds_to_first_token": _between(call.began, call.first_token),
    }
    if call.answering is not None:
        fields |= {
            "prompt_tokens": call.prompt_tokens,
            "cached_prompt_tokens": call.cached_prompt_tokens,
            "completion_tokens": call.completion_tokens,
        }
    fields |= {"trace_id": call.trace_id, "span_id": call.span_id}
    fields |= {"prompt": call.prompt[:MAX_TEXT], "answer": call.answer[:MAX_TEXT]}
    return {name: value for name, value in fields.items() if value not in ("", None)}


def escaped(text: str) -> str:
    """`text` on one line, without characters that a terminal obeys."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character) if _is_unsafe(character) else character for character in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] | None = getattr(record, _FIELDS, None)
    if fields is not None:
        return fields
    call = CURRENT.get()
    if call is None:
        return {}
    ids = {"request_id": call.request_id, "trace_id": call.trace_id, "span_id": call.span_id}
    return {name: value for name, value in ids.items() if value}


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else escaped(json.dumps(text, ensure_ascii=False))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _between(begin: float, end: float | None) -> float | None:
    return None if end is None else round(end - begin, 6)
