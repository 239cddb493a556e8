"""Checks forms of answers for the service's process, in a process whose children may die of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loraf.errors import LorafError, Problem, one_line
from loraf_serve.backends.backend import StructuredOutput
from loraf_serve.errors import TryLater
from loraf_serve.vllm.forms import keywords, trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELD = "sampling.structured_output"
_REMEMBERED = 1 << 24  # characters of forms whose outcome is kept
_MOST_WAITING = 16  # new forms, so that none waits long
_PATIENCE = 30.0  # seconds until an answer must be there, on a machine however busy
_START_PATIENCE = 120.0  # seconds
_LINE = 1 << 26  # bytes of one line

_Key = tuple[str, str, tuple[int, ...]]  # kind, text, stop tokens
_Outcome = tuple[str, str]  # what is wrong with the form, or ""; the form for vLLM


class FormChecker:
    """Tries each form once, one at a time. The process starts with the first form.

    Args:
        tokenizer: of the model.
        vocab_size: number of token ids as vLLM counts them.
        spaces: JSON may have spaces between its parts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, spaces: bool = True):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._spaces = spaces
        self._info = ""
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0  # checks of forms that are not known yet
        self._outcomes: OrderedDict[_Key, _Outcome] = OrderedDict()
        self._characters = 0  # of all that is remembered

    async def check(self, form: StructuredOutput, stop_token_ids: Iterable[int]) -> tuple[str, str]:
        """Returns the form for vLLM: "regex", "ebnf", "lark" or "structural_tag", and its text.

        Args:
            stop_token_ids: every token that ends the answer.

        Raises:
            LorafError: XGrammar cannot keep to the form, or it takes too much time or memory.
            TryLater: too many new forms wait to be tried.
        """
        kind, value = _of_xgrammar(form)
        field = f"{_FIELD}.{form.kind}"
        if kind == "json_schema":
            problem = keywords.problem_with(json.loads(value))
            if problem:
                raise LorafError(Problem(problem, field, remedy="leave it out, or use a grammar"))
        key = (kind, value, tuple(sorted(set(stop_token_ids))))
        if key not in self._outcomes:  # a known form never waits for others
            if self._waiting >= _MOST_WAITING:
                raise TryLater(f"{self._waiting} new forms of answers wait to be tried, the limit", trial.SECONDS)
            self._waiting += 1
            try:
                async with self._turn:
                    if key not in self._outcomes:
                        self._remember(key, await self._outcome(*key))
            finally:
                self._waiting -= 1
        self._outcomes.move_to_end(key)
        problem, text = self._outcomes[key]
        if problem:
            raise LorafError(Problem(problem, field, remedy="send a form that XGrammar can keep to"))
        return "ebnf" if kind == "json_schema" else kind, text

    def _remember(self, key: _Key, outcome: _Outcome) -> None:
        self._outcomes[key] = outcome
        self._characters += len(key[1]) + len(outcome[1])
        while self._characters > _REMEMBERED and len(self._outcomes) > 1:
            (_, value, _), (_, text) = self._outcomes.popitem(last=False)
            self._characters -= len(value) + len(text)

    async def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the child that tries a form
            await process.wait()

    async def _outcome(self, kind: str, value: str, stop_token_ids: tuple[int, ...]) -> _Outcome:
        process = self._process or await self._start()
        form = {"kind": kind, "value": value, "stop_token_ids": stop_token_ids, "spaces": self._spaces}
        answer = asyncio.create_task(_answer(process, json.dumps(form), _PATIENCE))
        try:
            return await asyncio.shield(answer)
        except _DiedError as death:
            await self.stop()
            return str(death), ""
        except asyncio.CancelledError:
            await self._give_up(process, answer)
            raise
        except BaseException:
            await self.stop()
            raise

    async def _give_up(self, process: asyncio.subprocess.Process, answer: asyncio.Task[_Outcome]) -> None:
        """Ends the trial of a form, so that its answer is not taken for that to another form."""
        try:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
            await asyncio.wait([answer])
        except asyncio.CancelledError:
            answer.cancel()
            await self.stop()
            raise
        if answer.cancelled() or answer.exception():
            await self.stop()

    async def _start(self) -> asyncio.subprocess.Process:
        """Raises LorafError: XGrammar does not support the tokenizer. RuntimeError: an internal fault."""
        try:
            self._info = self._info or await asyncio.to_thread(self._tokenizer_info)
        except Exception as error:
            message = f"XGrammar does not support the model's tokenizer ({one_line(error)})"
            raise LorafError(Problem(message, _FIELD, remedy="leave it out")) from None
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", os.path.abspath(trial.__file__)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            env=os.environ | {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"},
            limit=_LINE,
            process_group=0,  # signals to the service's group do not reach it
        )
        try:
            await _answer(self._process, self._info, _START_PATIENCE)
        except BaseException as error:
            await self.stop()
            if isinstance(error, _DiedError):  # not because of a form
                raise RuntimeError("the process that tries forms of answers does not start") from error
            raise
        return self._process

    def _tokenizer_info(self) -> str:
        import xgrammar

        info: str = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size
        ).serialize_json()
        return info


def _python_path() -> str:
    """Where this process finds packages, without its working directory: a file there may have any package's name."""
    folders = (os.path.abspath(folder) for folder in sys.path if folder)
    return os.pathsep.join(folder for folder in folders if folder != os.getcwd())


class _DiedError(Exception):
    """The process was ended by a signal, or takes too long; the text says how."""


async def _answer(process: asyncio.subprocess.Process, line: str, patience: float) -> _Outcome:
    """Sends a line of JSON and returns the answer.

    Raises:
        _DiedError: because of the line.
        RuntimeError: an internal fault.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(patience):
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
            answer = await process.stdout.readline()
            if answer:
                problem, text = json.loads(answer)
                return problem, text
            status = await process.wait()
    except TimeoutError:
        raise _DiedError(trial.TOO_LONG) from None
    except (BrokenPipeError, ConnectionResetError):
        status = await process.wait()
    if status >= 0:
        raise RuntimeError(f"the process that tries forms of answers ended with status {status}")
    raise _DiedError("takes too much memory, or XGrammar fails on it")


def _of_xgrammar(form: StructuredOutput) -> tuple[str, str]:
    """As vLLM passes a form to XGrammar."""
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    if form.kind == "choice":
        return "ebnf", choice_as_grammar(list(form.value))
    value: Any = form.value
    if form.kind == "grammar":
        return "lark" if grammar_is_likely_lark(value) else "ebnf", value
    return form.kind, value
