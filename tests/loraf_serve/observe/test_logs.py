"""Log lines: readable by machines, one per event whatever a client writes, and without texts unless asked for."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest

from loraf_serve.observe import logs
from loraf_serve.observe.call import CURRENT, Call
from loraf_serve.service.server_options import LOG_FORMATS
from tests.loraf_serve.observe.calls import answer, begin, end

FORGED = "hello\n2026-01-01 00:00:00,000 INFO loraf_serve.calls: Generate OK\r\x1b[2J\u2028\u202etxet\x00\x85"
logger = logging.getLogger("loraf_serve.test")


@pytest.fixture
def lines():
    """Configures logging. Returns a function that configures the format and one that returns the lines so far."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()

    def configured(log_format):
        logs.configure(log_format, stream)
        return lambda: stream.getvalue().split("\n")[:-1]

    yield configured
    root.handlers[:], level = before
    root.setLevel(level)


def test_a_call_is_one_line_of_json(lines):
    written = lines("json")
    answer([logs.LogObserver()])
    [line] = written()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "INFO",
        "logger": "loraf_serve.calls",
        "message": "Generate OK",
        "request_id": "r1",
        "method": "/loraf.v1.GenerationService/Generate",
        "code": "OK",
        "adapter": "trio",
        "task_set": "math",
        "seconds": 1.0,
        "seconds_to_first_token": 0.5,
        "prompt_tokens": 10,
        "cached_prompt_tokens": 4,
        "completion_tokens": 3,
    }


def test_a_call_is_one_line_of_text(lines):
    written = lines("text")
    call = begin([])
    call.client, call.trace_id = "web shop", "ab" * 16
    end([logs.LogObserver()], call, "UNAVAILABLE")
    [line] = written()
    when, _, rest = line.partition(" INFO ")
    assert len(when) == len("2026-01-31 12:00:00,123")
    assert rest == (
        "loraf_serve.calls: Generate UNAVAILABLE request_id=r1 method=/loraf.v1.GenerationService/Generate "
        f'code=UNAVAILABLE client="web shop" seconds=1 trace_id={"ab" * 16}'
    )


@pytest.mark.parametrize("log_format", LOG_FORMATS)
def test_a_clients_text_stays_in_its_line(lines, log_format):
    written = lines(log_format)
    call = begin([])
    call.request_id = call.prompt = call.answer = call.client = FORGED
    end([logs.LogObserver()], call, "OK")
    logger.info("request %s failed", FORGED)
    text = "\n".join(written())
    assert len(written()) == 2
    assert all(character == "\n" or character.isprintable() for character in text)
    if log_format == "json":
        assert json.loads(written()[0])["prompt"] == FORGED


@pytest.mark.parametrize("log_format", LOG_FORMATS)
def test_a_traceback_is_not_taken_for_another_line(lines, log_format):
    written = lines(log_format)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("failed")
    first, *others = written()
    assert "failed" in first
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert bool(others) == (log_format == "text")
    if log_format == "json":
        assert "ValueError: hello" in json.loads(first)["traceback"]


def test_lines_that_are_logged_during_a_call_name_it(lines):
    written = lines("json")
    token = CURRENT.set(Call("/m", request_id="mine", trace_id="t", span_id="s"))
    try:
        logger.info("inside")
    finally:
        CURRENT.reset(token)
    logger.info("outside")
    inside, outside = map(json.loads, written())
    assert (inside["request_id"], inside["trace_id"], inside["span_id"]) == ("mine", "t", "s")
    assert "request_id" not in outside


def test_texts_are_logged_only_if_the_service_gives_them_and_never_without_end(lines):
    written = lines("json")
    call = begin([])
    call.prompt, call.answer = "p" * 10**6, "a"
    answer([logs.LogObserver()], call=call)
    fields = json.loads(written()[0])
    assert (len(fields["prompt"]), fields["answer"]) == (logs.MAX_TEXT, "a")


def test_vllm_logs_as_json_too():
    """In its processes as well: they inherit the environment."""
    script = """
from loraf_serve.observe import logs
logs.configure_vllm()
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger
configure_logging(LoggingConfig())  # as an engine's processes do
init_logger("vllm.engine").info("started\\nforged")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    line = json.loads(run.stderr.strip().splitlines()[-1])
    assert (line["logger"], line["message"]) == ("vllm.engine", "started\nforged")
