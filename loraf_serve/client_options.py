"""The command line of `loraf-client`: every command and option. Imports neither grpc nor protobuf."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import __version__
from loraf.errors import LorafError
from loraf_serve.addresses import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from loraf.set_text import SetText

TOKEN_VARIABLE = "LORAF_TOKEN"
DEFAULT_WAIT = 600.0  # seconds; a large model takes minutes to load
DEFAULT_MAX_TOKENS = 256  # the server's default of 16, which is vLLM's, cuts most answers short


def parser() -> argparse.ArgumentParser:
    """The command line of `loraf-client`."""
    command = argparse.ArgumentParser(
        prog="loraf-client", description="Send requests to a loraf-serve server.", allow_abbrev=False
    )
    command.add_argument("--version", action="version", version=f"loraf {__version__}")
    connection = _connection()
    server = argparse.ArgumentParser(add_help=False, parents=[connection])
    server.add_argument("--json", action="store_true", help="print messages as JSON, one per line (default: text)")
    answers = _answers()
    commands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[server, answers], help="generate text", allow_abbrev=False)
    generate.add_argument("prompt", help="text of the prompt, or - to read it from standard input")
    generate.add_argument(
        "--task-template",
        action="store_true",
        help="put the prompt into the template that the selected task was trained with",
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="send the prompt as a message of a chat, through the model's chat template",
    )
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="answer in JSON that follows the JSON schema in this file"
    )
    form.add_argument("--regex", metavar="PATTERN", help="answer with text that matches this regular expression")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="answer with one of these texts; repeat it for each of them"
    )
    generate.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="file with a JSON list of the tools that the model may call, in the form of OpenAI's API; implies --chat",
    )
    generate.add_argument(
        "--no-stream", action="store_true", help="print the answer when it is complete (default: as it is generated)"
    )

    chat = commands.add_parser("chat", parents=[connection, answers], help="have a conversation", allow_abbrev=False)
    chat.add_argument(
        "--system", metavar="TEXT", help="instructions that stand before the conversation (default: none)"
    )

    commands.add_parser("adapters", parents=[server], help="list the loaded adapters", allow_abbrev=False)
    load = commands.add_parser(
        "load", parents=[server], help="load a checkpoint while the server runs (the server needs --adapter-root)"
    )
    load.add_argument("name", help="name by which requests will use the adapter")
    load.add_argument("path", help="folder of the checkpoint, relative to the server's --adapter-root")
    load.add_argument("--tasks", type=_names, metavar="A,B", help="tasks to load (default: all)")
    load.add_argument(
        "--replace",
        action="store_true",
        help="replace the adapter of this name; running requests end on the old content (default: refuse a taken name)",
    )
    unload = commands.add_parser("unload", parents=[server], help="unload an adapter (the server needs --adapter-root)")
    unload.add_argument("name", help="name of the adapter")
    commands.add_parser("info", parents=[server], help="show the server's model, backend, versions and limits")
    health = commands.add_parser("health", parents=[server], help="exit with status 0 if the server is serving, else 1")
    health.add_argument(
        "--wait",
        type=_seconds,
        nargs="?",
        const=DEFAULT_WAIT,
        metavar="SECONDS",
        help="wait this long for the server to serve, also for one that does not listen yet (default: do not wait; "
        f"without a number: {DEFAULT_WAIT:g})",
    )
    return command


def _connection() -> argparse.ArgumentParser:
    """How to reach the server: options of every command."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--server",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"address of the server (default: {DEFAULT_ADDRESS})",
    )
    options.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="time limit of the request, in seconds (default: none)"
    )
    options.add_argument(
        "--tls", action="store_true", help="connect over TLS and trust the system's authorities (default: no TLS)"
    )
    options.add_argument(
        "--tls-ca", type=Path, metavar="PEM", help="connect over TLS and trust the authority in this file"
    )
    options.add_argument(
        "--tls-cert",
        type=Path,
        metavar="PEM",
        help="connect over TLS and present this client certificate (default: none)",
    )
    options.add_argument("--tls-key", type=Path, metavar="PEM", help="private key of --tls-cert, not encrypted")
    options.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the bearer token and nothing else (default: the token in {TOKEN_VARIABLE}, if set)",
    )
    options.add_argument(
        "--insecure-token",
        action="store_true",
        help="send the token to another machine without TLS (default: refuse)",
    )
    options.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="how often a request that changes nothing is sent again, from 0 to 4, if the server is unavailable or its "
        "queue is full (default: 3)",
    )
    return options


def _answers() -> argparse.ArgumentParser:
    """What answers, and how tokens are sampled: options of the commands that generate text."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--adapter", default="", metavar="NAME", help="name of the adapter (default: the only one that is loaded)"
    )
    selection = options.add_mutually_exclusive_group()
    selection.add_argument(
        "--tasks",
        type=_task_set,
        metavar="SET",
        help="use exactly this task set: tasks such as math+nlu:0.5, a named set, as_trained=TASK, all, or base; a "
        "comma may be written for + (default: all tasks, weight 1)",
    )
    selection.add_argument(
        "--as-trained", metavar="TASK", help="use the task set that was active when this task had just been trained"
    )
    selection.add_argument("--base", action="store_true", help="use the base model without any task")
    options.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help=f"limit on generated tokens, at least 1 (default: {DEFAULT_MAX_TOKENS})",
    )
    options.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature: 0 for greedy decoding, or 0.01 to 2 (default: 0)",
    )
    options.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P, above 0 and at most 1 (default: 1)",
    )
    options.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens, 0 for all (default: 0)"
    )
    options.add_argument(
        "--seed", type=int, metavar="N", help="seed that makes sampling repeatable, at least 0 (default: random)"
    )
    options.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated up to 16 times (default: none)",
    )
    options.add_argument(
        "--priority",
        type=int,
        metavar="N",
        help="requests of a lower number run first, from -1000 to 1000, on a server that schedules by priority "
        "(default: 0)",
    )
    return options


def _task_set(text: str) -> SetText:
    from loraf import set_text

    try:
        return set_text.parse(text)
    except LorafError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> list[str]:
    """`math,nlu` → ["math", "nlu"]."""
    return [name.strip() for name in text.split(",")]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
