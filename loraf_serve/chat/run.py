"""The chat: reads lines until there are no more, answers questions, obeys commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loraf.errors import LorafError, Problem, one_line
from loraf_serve.chat import commands, sets
from loraf_serve.chat.asking import Asker
from loraf_serve.chat.conversation import Conversation, Turn
from loraf_serve.chat.keyboard import Keyboard
from loraf_serve.chat.screen import Answering, Screen
from loraf_serve.client import AsyncClient, PermissionDenied, ServiceError
from loraf_serve.client.set_arguments import adapter_named
from loraf_serve.v1.adapter_pb2 import Adapter

T = TypeVar("T")
_ALL = "all"
_TASKS = "task_selection"  # the field of a refusal that is about tasks
# What a question, a command or an option can fail with; none of it ends the chat.
_FAILURES = (ServiceError, LorafError, OSError, TypeError, ValueError)


def chat(client: AsyncClient, adapter: str, task_set: str, request: Mapping[str, Any], system: str = "") -> int:
    """Runs the chat until the input ends or `/quit`.

    Args:
        client: is closed at the end.
        adapter: its name; "" for the only one.
        task_set: to begin with; "" for all tasks, or those that the client's token may use.
        request: sampling and priority, as arguments of `request_of`.
        system: instructions before the first turn; "": none.

    Returns:
        0; 1 if the input is not a terminal and something in it failed.

    Raises:
        ServiceError: the server cannot be reached, or refuses this client.
        SelectionError: the adapter does not have the task set.
    """
    with asyncio.Runner() as runner:
        try:
            return _Chat(runner, client, adapter, task_set, request, system).run()
        finally:
            runner.run(client.close())


class _Chat:
    def __init__(
        self,
        runner: asyncio.Runner,
        client: AsyncClient,
        adapter: str,
        task_set: str,
        request: Mapping[str, Any],
        system: str,
    ):
        self._runner = runner
        self._client = client
        self._adapter_name = adapter
        self._adapter: Adapter | None = None
        self._asker = Asker(client, {**request, "adapter": adapter})
        self._conversation = Conversation(system)
        self._screen = Screen()
        info = self._wait(client.server_info())
        self._chosen = self._choose(task_set or _ALL)
        self._is_default = not task_set
        self._keyboard = Keyboard(self._words)
        self._screen.note(f"{info.model} on {client.address}, backend {info.backend}")
        for line in sets.described(self._adapter):
            self._screen.note(line)
        self._screen.note("/help lists the commands")

    def run(self) -> int:
        failed = False
        while True:
            try:
                line = self._keyboard.line(f"{self._chosen.text}> ")
                if line is None or not self._do(line.strip()):
                    return int(failed and not self._keyboard.is_terminal)
            except KeyboardInterrupt:
                if not self._keyboard.is_terminal:
                    raise
                self._screen.end()
            except _FAILURES as error:
                failed = True
                self._screen.error(_told(error))

    def _do(self, line: str) -> bool:
        """Returns whether the chat goes on."""
        parsed = commands.parse(line)
        if parsed is None:
            if line:
                self._ask(commands.question_of(line))
            return True
        command, arguments = parsed
        if command.name == "quit":
            return False
        handlers: dict[str, Callable[[str], None]] = {
            "tasks": self._tasks,
            "base": lambda _: self._tasks("base"),
            "compare": self._compare,
            "clear": self._clear,
            "save": self._save,
            "help": lambda _: self._show(commands.help_lines()),
        }
        handlers[command.name](arguments)
        return True

    def _ask(self, question: str) -> None:
        answer, written = None, Answering()

        def show(text: str) -> None:
            written.add(text)
            self._screen.piece(text)

        messages = self._conversation.messages(question)
        try:
            try:
                answer = self._wait(self._asker.ask(self._chosen, messages, show, self._screen.note))
            except PermissionDenied as error:
                if _TASKS not in error.message or not self._choose_what_is_allowed():
                    raise
                answer = self._wait(self._asker.ask(self._chosen, messages, show, self._screen.note))
        except KeyboardInterrupt:
            if not self._keyboard.is_terminal:
                raise
        finally:
            if written.text:
                self._screen.end()
        if answer is None:
            self._screen.note("[stopped]")
        else:
            self._screen.note(f"[{answer.summary()}]")
        if answer or written.text:
            self._conversation.turns.append(Turn(question, self._chosen.text, written.text, answer))

    def _compare(self, arguments: str) -> None:
        texts, separator, question = arguments.partition("--")
        if not separator and not self._conversation.turns:
            raise LorafError(Problem("there is no question yet", remedy="write /compare SET SET … -- QUESTION"))
        if separator and not question.strip():
            raise LorafError(Problem("nothing stands after --", remedy="write /compare SET SET … -- QUESTION"))
        chosen = list({each.text: each for each in map(self._choose, texts.split())}.values())
        if not chosen:
            raise LorafError(Problem("names no set", remedy="write /compare SET SET … -- QUESTION"))
        messages = self._conversation.messages(question.strip() if separator else None)
        answers = {each.text: Answering() for each in chosen}
        notes: list[str] = []

        async def ask(each: sets.ChosenSet) -> None:
            answer = answers[each.text]
            try:
                whole = await self._asker.ask(
                    each, messages, answer.add, lambda text: notes.append(f"{each.text}: {text}")
                )
                notes.append(f"[{whole.summary()}]")
            except (ServiceError, TypeError, ValueError) as error:
                answer.add(f"\n[{_told(error)}]" if answer.text else f"[{_told(error)}]")
            finally:
                answer.ended = True

        async def ask_all() -> None:
            await asyncio.gather(*(ask(each) for each in chosen))

        try:
            self._wait(self._screen.side_by_side(answers, ask_all()))
        finally:
            for note in notes:
                self._screen.note(note)

    def _tasks(self, text: str) -> None:
        if text:
            self._chosen, self._is_default = self._choose(text), False
            return
        self._read_adapter()
        self._show([*sets.described(self._adapter), f"answers now: {self._chosen.text}"])

    def _clear(self, _: str) -> None:
        self._conversation = Conversation(self._conversation.system)

    def _save(self, file: str) -> None:
        self._conversation.save(Path(file).expanduser())
        self._screen.note(f"saved to {file}")

    def _choose(self, text: str) -> sets.ChosenSet:
        self._read_adapter()
        return sets.choose(text, self._adapter)

    def _choose_what_is_allowed(self) -> bool:
        """Chooses the tasks that the client's token may use, if it was not the user who has chosen all of them."""
        if not self._is_default or self._chosen.text != _ALL:
            return False
        allowed = "+".join(task.name for task in self._adapter.tasks) if self._adapter else ""
        self._is_default, self._chosen = False, self._choose(allowed or "base")
        self._screen.note(f"this token may not use every task: {self._chosen.text} answers")
        return True

    def _read_adapter(self) -> None:
        """Adapters are loaded and replaced while a chat goes on."""
        self._adapter = adapter_named(self._adapter_name, self._wait(self._client.adapters()))

    def _show(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._screen.note(line)

    def _words(self) -> list[str]:
        tasks = [task.name for task in self._adapter.tasks] if self._adapter else []
        named = [each.name for each in self._adapter.sets] if self._adapter else []
        return [*commands.words(), *tasks, *named, "all", "base"]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine; Ctrl-C cancels it and raises KeyboardInterrupt."""
        return self._runner.run(work)


def _told(error: BaseException) -> str:
    """A failure on one line."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ServiceError):
        later = f"; try again in {error.retry_after:.1f} s" if error.retry_after else ""
        request = f" (request {error.request_id})" if error.code == "INTERNAL" and error.request_id else ""
        return one_line(error) + later + request
    return one_line(error)
