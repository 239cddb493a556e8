"""A process that tries forms of answers, each in a child, which may die of it.

`form_checker` runs this file without the package, so that nothing of the service's working directory is imported.

stdin    a line of JSON: the tokenizer, as XGrammar writes it; then a line for each form
stdout   a line of JSON: ready; then for each form: [what is wrong with it or "", the form for vLLM]
SIGUSR1  ends the trial of a form at once; there is a line for it nevertheless
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SECONDS = 2.0  # of processor time for a form
MEMORY = 1 << 30  # bytes, beyond what the process has when it begins
STEPS = 32  # tokens of an answer that is tried
STEP_SECONDS = 0.05  # of processor time for a token
TOO_LONG = f"takes more than {SECONDS:g} s to compile"

# XGrammar's rule for the characters of a text of limited length.
_CHARACTERS = re.compile(r'^(\S+_characters ::= \(\(\[\^)(\\"\\\\\\r\\n\]\)\))$', re.MULTILINE)


class InvalidFormError(Exception):
    """XGrammar cannot keep to a form; the text says why."""


def try_form(compiler: Any, vocab_size: int, kind: str, value: str, stop_token_ids: list[int], spaces: bool) -> str:
    """Compiles a form as vLLM does, and lets it derive the beginning of an answer.

    Args:
        compiler: XGrammar's, for a vocabulary of `vocab_size`.
        kind: "json_schema", "regex", "ebnf", "lark" or "structural_tag".
        spaces: JSON may have spaces between its parts.

    Returns:
        The form for vLLM: `value`, or the grammar of a JSON schema.

    Raises:
        InvalidFormError: XGrammar cannot keep to it.
    """
    import xgrammar

    methods: dict[str, Callable[[str], Any]] = {
        "regex": compiler.compile_regex,
        "ebnf": compiler.compile_grammar,
        "lark": compiler.compile_lark,
        "structural_tag": compiler.compile_structural_tag,
    }
    if kind == "regex":
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidFormError(f"is not a regular expression ({error})") from None
    with _warnings() as warnings:
        try:
            if kind == "json_schema":
                kind, value = "ebnf", _grammar_of(value, spaces)
            compiled = methods[kind](value)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InvalidFormError(_without_place(str(error))) from None
    if warnings:  # it would keep to a part of the form only
        raise InvalidFormError(_without_place(warnings[0]))
    _walk(xgrammar.GrammarMatcher(compiled, override_stop_tokens=stop_token_ids or None), vocab_size)
    return value


def _grammar_of(schema: str, spaces: bool) -> str:
    """A JSON schema as EBNF. JSON has no control characters, but XGrammar admits them in texts of limited length."""
    import xgrammar

    separators = None if spaces else (",", ":")  # as vLLM
    grammar = str(xgrammar.Grammar.from_json_schema(schema, any_whitespace=spaces, separators=separators))
    return _CHARACTERS.sub(lambda rule: rf"{rule[1]}\0-\x1f{rule[2]}", grammar)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What native code writes to stderr; complete when the block has ended."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            text = file.read().decode(errors="replace").strip()
            if text:
                texts.append(text)


def _walk(matcher: Any, vocab_size: int) -> None:
    """Derives the beginning of an answer, by chance but always the same. Raises InvalidFormError."""
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(1, vocab_size)
    source = random.Random(0)
    for step in range(STEPS):
        began = time.process_time()
        matcher.fill_next_token_bitmask(mask, 0)
        words = mask[0].tolist()
        allowed = [32 * i + bit for i, word in enumerate(words) if word for bit in range(32) if word >> bit & 1]
        if not allowed:
            raise InvalidFormError("no answer has this form" if step == 0 else "some answers could not be completed")
        matcher.accept_token(source.choice(allowed))
        if time.process_time() - began > STEP_SECONDS:
            raise InvalidFormError(f"takes more than {STEP_SECONDS:g} s for a token")
        if matcher.is_terminated():
            break


def _without_place(text: str) -> str:
    """XGrammar's message without the time and the line of its source."""
    message = text.split("] ", 1)[-1].split(": ", 1)[-1].removeprefix("Warning: ")
    return " ".join(message.split())


def main() -> None:
    """Tries forms until stdin ends."""
    import xgrammar

    lines = sys.stdin
    info = xgrammar.TokenizerInfo.deserialize_json(lines.readline())
    # With the cache, as in the engine: some forms cannot be compiled with it. Each form has a process of its own, so
    # that it leaves nothing behind. Threads would make little faster and use time unseen.
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    child = 0

    def give_up(*_: object) -> None:
        if child:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGUSR1, give_up)
    print(json.dumps(["", "ready"]), flush=True)
    for line in lines:
        child = os.fork()  # ready at once, where a new process would import everything again
        if child == 0:
            _answer(compiler, info.vocab_size, line)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is still there if `give_up` ends it now
        ended, child = child, 0
        status = os.waitstatus_to_exitcode(os.waitpid(ended, 0)[1])
        if status > 0:
            sys.exit(status)
        if status < 0:
            too_long = status == -signal.SIGPROF
            print(
                json.dumps([TOO_LONG if too_long else "takes too much memory, or XGrammar fails on it", ""]), flush=True
            )


def _answer(compiler: Any, vocab_size: int, line: str) -> NoReturn:
    """Tries one form, writes the outcome and ends the process."""
    status = 1
    try:
        # Native code runs no handler of Python's: the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome = ["", try_form(compiler, vocab_size, **json.loads(line))]
        except InvalidFormError as error:
            outcome = [str(error), ""]
        except MemoryError:
            outcome = ["takes too much memory", ""]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(outcome), flush=True)
        status = 0
    finally:
        os._exit(status)  # never back into the loop of the parent


if __name__ == "__main__":
    main()
