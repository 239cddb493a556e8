"""The commands of the chat: lines that begin with /.

Each is a method of `Chat` that is named here with its arguments and its help. The list is what `/help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraf.errors import LorafError, Problem

SIGN = "/"


@dataclass(frozen=True)
class Command:
    """A line that begins with /.

    Attributes:
        arguments: how they are written, in `/help`.
    """

    name: str
    arguments: str
    help: str

    @property
    def usage(self) -> str:
        return f"{SIGN}{self.name} {self.arguments}".rstrip()


COMMANDS = (
    Command("tasks", "[SET]", "answer with this task set, such as math:0.5+nlu; without SET: what there is"),
    Command("base", "", "answer with the base model, without any task"),
    Command("compare", "SET SET … [-- QUESTION]", "ask under each of these sets: a question, or the last one again"),
    Command("clear", "", "forget the conversation"),
    Command("save", "FILE", "write the conversation to a file, as a record that training reads"),
    Command("help", "", "list the commands"),
    Command("quit", "", "end the chat, as Ctrl-D does; Ctrl-C stops an answer"),
)
_BY_NAME = {command.name: command for command in COMMANDS}


def parse(line: str) -> tuple[Command, str] | None:
    """Splits a line into a command and its arguments; None: it is a question.

    Raises:
        LorafError: there is no such command, it takes no arguments, or lacks some.
    """
    if not line.startswith(SIGN) or line.startswith(SIGN * 2):
        return None
    name, _, arguments = line[len(SIGN) :].strip().partition(" ")
    command, arguments = _BY_NAME.get(name), arguments.strip()
    if command is None:
        remedy = f"{SIGN}help lists the commands; begin with {SIGN * 2} for a question that begins with {SIGN}"
        raise LorafError(Problem(f"there is no command {SIGN}{name}", remedy=remedy))
    is_optional = command.arguments.startswith("[") or not command.arguments
    if (arguments and not command.arguments) or not (arguments or is_optional):
        takes = "takes no arguments" if not command.arguments else "lacks an argument"
        raise LorafError(Problem(f"{SIGN}{name} {takes}", remedy=f"write {command.usage}"))
    return command, arguments


def question_of(line: str) -> str:
    """The question that a line is; // at its beginning stands for /."""
    return line[len(SIGN) :] if line.startswith(SIGN * 2) else line


def help_lines() -> list[str]:
    """What `/help` prints."""
    width = max(len(command.usage) for command in COMMANDS)
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS]
    return [*lines, "A line that ends with \\ goes on in the next one."]


def words() -> list[str]:
    """The commands as they are typed."""
    return [SIGN + command.name for command in COMMANDS]
