"""Reference of the commands, generated from their argparse parsers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Collection, Iterator

MODULES = {
    "loraf-train": "loraf_train.cli",
    "loraf-serve": "loraf_serve.cli",
    "loraf-client": "loraf_serve.client_cli",
}


CHECK = "loraf-serve check"  # a command, and yet no subparser: without it, loraf-serve takes the same options


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of `loraf-train`, `loraf-serve`, `loraf-client` or CHECK."""
    if program == CHECK:
        check: argparse.ArgumentParser = importlib.import_module(MODULES["loraf-serve"]).check_parser()
        return check
    module = importlib.import_module(MODULES[program])
    build = next(getattr(module, name) for name in ("build_parser", "parser") if hasattr(module, name))
    parser: argparse.ArgumentParser = build()
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the subcommands, in their order; empty if there are none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def markdown(program: str) -> str:
    """One section for each subcommand (or for the command itself): usage, arguments and options."""
    parser = parser_of(program)
    parts = []
    commands = subparsers(parser)
    if commands:
        summaries = _summaries(parser)
        parts.append("| Command | |\n| --- | --- |")
        parts[-1] += "".join(f"\n| [`{name}`](#{program}-{name}) | {_cell(summaries[name])} |" for name in commands)
        shared = _shared(list(commands.values()))
        if shared:
            parts += ["## Options of every command", "\n".join(_entry(action) for action in shared)]
        for name, command in commands.items():
            parts.append(f"## {program} {name}")
            parts += _sections(command, "###", {action.dest for action in shared})
    else:
        parts += _sections(parser, "##")
    if parser.epilog:
        example = parser.formatter_class is argparse.RawDescriptionHelpFormatter
        parts.append(f"```text\n{parser.epilog.strip()}\n```" if example else _text(parser.epilog))
    return "\n\n".join(parts)


def check_markdown() -> str:
    """What `loraf-serve check` does, and the options that it takes beside those of `loraf-serve`."""
    parser, server = parser_of(CHECK), parser_of("loraf-serve")
    known = {option for action in server._actions for option in action.option_strings}
    own = [action for action in parser._actions if not known & set(action.option_strings)]
    parts = [_text(parser.description or ""), f"```text\n{(parser.epilog or '').strip()}\n```"]
    return "\n\n".join([*parts, "\n".join(_entry(action) for action in own)])


def _summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {}


def _shared(commands: list[argparse.ArgumentParser]) -> list[argparse.Action]:
    """Options that every subcommand takes from one parent parser."""
    first, *others = ([a for a in command._actions if not isinstance(a, _HIDDEN)] for command in commands)
    return [action for action in first if all(any(action is a for a in actions) for actions in others)]


def _sections(parser: argparse.ArgumentParser, level: str, elsewhere: Collection[str] = ()) -> Iterator[str]:
    if parser.description:
        yield _text(parser.description)
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    yield f"```text\n{formatter.format_help().strip()}\n```"
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, _HIDDEN) and a.dest not in elsewhere]
        if actions:
            if group.title not in ("positional arguments", "options"):
                yield f"{level} {str(group.title)[:1].upper()}{str(group.title)[1:]}"
            yield "\n".join(_entry(action) for action in actions)


_HIDDEN = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)


def _entry(action: argparse.Action) -> str:
    """A definition list's entry."""
    value = action.metavar or (None if action.choices is None else "|".join(map(str, action.choices)))
    if action.option_strings:
        takes = action.nargs != 0
        value = value or action.dest.upper()
        name = ", ".join(f"{option} {value}" if takes else option for option in action.option_strings)
    else:
        name = str(value or action.dest)
    notes = [] if not (action.required and action.option_strings) else ["required"]
    text = _text((action.help or "") % {"default": action.default, "prog": "", "choices": action.choices or ""})
    return f"`{name}`\n:   {'; '.join([part for part in (text, *notes) if part]) or '—'}\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def _text(text: str) -> str:
    """Plain text as Markdown: options become code, characters of Markdown stay what they are."""
    text = text.replace("<", "&lt;").replace("*", r"\*").replace("[", r"\[")
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", text)


def _cell(text: str) -> str:
    return _text(_sentence(text)).replace("|", r"\|")
