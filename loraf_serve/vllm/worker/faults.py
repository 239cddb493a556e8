"""Passes on why a process of the engine failed: vLLM tells the service only that it did, and logs the reason.

The service sets FAULTS to the name of a file, and the plugin calls `record` in each process of the engine.
"""

from __future__ import annotations

import logging
from pathlib import Path

from loraf.errors import one_line

FAULTS = "LORAF_ENGINE_FAULTS"  # environment variable


def record(file: str) -> logging.Handler:
    """Writes the errors that vLLM logs in this process to a file, one a line, as long as its folder exists."""
    recorder = _Recorder(file)
    logging.getLogger("vllm").addHandler(recorder)
    return recorder


def first(file: Path) -> str:
    """The first error that any process recorded, which the others follow from; "" if there is none."""
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return ""


class _Recorder(logging.Handler):
    def __init__(self, file: str):
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(f"{type(error).__name__}: {one_line(error)}\n")
        except OSError:
            return  # the service no longer waits for the engine to start
