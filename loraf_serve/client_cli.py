"""`loraf-client`: requests to a loraf-serve server from the shell. Parses the command line before it imports grpc."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import __version__
from loraf_serve.addresses import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from loraf_serve.client import Client
    from loraf_serve.v1 import adapter_pb2, generation_pb2

DEFAULT_MAX_TOKENS = 256  # the server's default of 16, which is vLLM's, cuts most answers short
# User errors: exit status 2. All others are failures of the server or the network: 1.
_USER_ERRORS = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "ALREADY_EXISTS",
    "DATA_LOSS",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
}


def parser() -> argparse.ArgumentParser:
    """The command line of `loraf-client`. Imports neither grpc nor protobuf."""
    command = argparse.ArgumentParser(
        prog="loraf-client", description="Send requests to a loraf-serve server.", allow_abbrev=False
    )
    command.add_argument("--version", action="version", version=f"loraf {__version__}")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--server",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"address of the server (default: {DEFAULT_ADDRESS})",
    )
    server.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="time limit of the request, in seconds (default: none)"
    )
    server.add_argument(
        "--tls", action="store_true", help="connect over TLS and trust the system's authorities (default: no TLS)"
    )
    server.add_argument(
        "--tls-ca", type=Path, metavar="PEM", help="connect over TLS and trust the authority in this file"
    )
    server.add_argument(
        "--tls-cert",
        type=Path,
        metavar="PEM",
        help="connect over TLS and present this client certificate (default: none)",
    )
    server.add_argument("--tls-key", type=Path, metavar="PEM", help="private key of --tls-cert, not encrypted")
    server.add_argument("--json", action="store_true", help="print messages as JSON, one per line (default: text)")
    commands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[server], help="generate text", allow_abbrev=False)
    generate.add_argument("prompt", help="text of the prompt, or - to read it from standard input")
    generate.add_argument(
        "--adapter", default="", metavar="NAME", help="name of the adapter (default: the only one that is loaded)"
    )
    selection = generate.add_mutually_exclusive_group()
    selection.add_argument(
        "--tasks",
        type=_tasks,
        metavar="A,B[:WEIGHT]",
        help="use exactly these tasks, for example math,nlu:0.5 (default: all tasks, weight 1)",
    )
    selection.add_argument(
        "--as-trained", metavar="TASK", help="use the task set that was active when this task had just been trained"
    )
    selection.add_argument("--base", action="store_true", help="use the base model without any task")
    generate.add_argument(
        "--task-template",
        action="store_true",
        help="put the prompt into the template that the selected task was trained with",
    )
    generate.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help=f"limit on generated tokens, at least 1 (default: {DEFAULT_MAX_TOKENS})",
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature: 0 for greedy decoding, or 0.01 to 2 (default: 0)",
    )
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P, above 0 and at most 1 (default: 1)",
    )
    generate.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens, 0 for all (default: 0)"
    )
    generate.add_argument(
        "--seed", type=int, metavar="N", help="seed that makes sampling repeatable, at least 0 (default: random)"
    )
    generate.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated up to 16 times (default: none)",
    )
    generate.add_argument(
        "--no-stream", action="store_true", help="print the answer when it is complete (default: as it is generated)"
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
    commands.add_parser("health", parents=[server], help="exit with status 0 if the server is serving, else 1")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 on success, 2 for a user error, 1 if the server failed or is not serving.
    """
    arguments = parser().parse_args(argv)
    from loraf_serve.client import Client, ServiceError

    try:
        client = Client(
            arguments.server,
            tls=arguments.tls,
            tls_ca=arguments.tls_ca,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            timeout=arguments.timeout,
        )
    except OSError as error:
        print(f"loraf-client: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        with client:
            return _COMMANDS[arguments.command](client, arguments)
    except ServiceError as error:
        print(f"loraf-client: {error}", file=sys.stderr)
        # A full queue is not a user error; a checkpoint too large for the server is.
        too_large = error.code == "RESOURCE_EXHAUSTED" and arguments.command == "load"
        return 2 if error.code in _USER_ERRORS or too_large else 1
    except ValueError as error:  # a number out of the field's range, or a prompt that is not Unicode text
        print(f"loraf-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _generate(client: Client, arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    request = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    request |= {
        "adapter": arguments.adapter,
        "tasks": arguments.tasks,
        "as_trained": arguments.as_trained,
        "base": arguments.base,
        "apply_task_template": arguments.task_template,
    }
    if arguments.no_stream:
        answer = client.generate(prompt, **request)
        if arguments.json:
            _print_json(answer.response)
        else:
            print(answer.text)
            _print_served_by(answer.response, answer.finish_reason)
        return 0
    piece = None
    for piece in client.stream(prompt, **request):
        if arguments.json:
            _print_json(piece.response)
        else:
            print(piece.text, end="", flush=True)
    if piece and not arguments.json:
        print()
        _print_served_by(piece.response, piece.finish_reason)
    return 0


def _adapters(client: Client, arguments: argparse.Namespace) -> int:
    for adapter in client.adapters():
        _print_adapter(adapter, arguments)
    return 0


def _load(client: Client, arguments: argparse.Namespace) -> int:
    _print_adapter(client.load_adapter(arguments.name, arguments.path, arguments.tasks, arguments.replace), arguments)
    return 0


def _unload(client: Client, arguments: argparse.Namespace) -> int:
    response = client.unload_adapter(arguments.name)
    if arguments.json:
        _print_json(response)
        return 0
    count, names = response.running_requests, ", ".join(response.other_names)
    conditions = [f"the last of {count} running request{'s' * (count > 1)} has ended"] if count else []
    conditions += [f"{names} (the same content) is unloaded too"] if names else []
    freed = f"is freed when {' and '.join(conditions)}" if conditions else "has been freed"
    print(f"{arguments.name}: unloaded; its memory {freed}")
    return 0


def _health(client: Client, arguments: argparse.Namespace) -> int:
    state = client.health()
    print(f'{{"status": "{state}"}}' if arguments.json else state)
    return 0 if state == "SERVING" else 1


_COMMANDS = {"generate": _generate, "adapters": _adapters, "load": _load, "unload": _unload, "health": _health}


def _print_adapter(adapter: adapter_pb2.Adapter, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json(adapter)
        return
    from loraf.units import size_text

    size = size_text(adapter.resident_bytes)
    print(f"{adapter.name}: rank {adapter.rank}, base {adapter.base_model}, digest {adapter.digest}, {size} in memory")
    for task in adapter.tasks:
        earlier = f", trained on top of {'+'.join(task.trained_with)}" if task.trained_with else ""
        print(f"  {task.name}: {task.parameters:,} parameters, alpha {task.alpha:g}{earlier}")


def _print_served_by(
    response: generation_pb2.GenerateResponse | generation_pb2.StreamGenerateResponse, finish_reason: str
) -> None:
    """Prints on standard error which tasks answered; standard output holds only the answer."""
    served_by, usage = response.served_by, response.usage
    tasks = "+".join(t.name if t.weight == 1 else f"{t.name}:{t.weight:g}" for t in served_by.tasks) or "base"
    adapter = f"{served_by.adapter}@{served_by.digest[:12]}, " if served_by.adapter else ""
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    print(f"[{tasks}; {adapter}{served_by.backend}; {tokens}; {finish_reason}]", file=sys.stderr)


def _print_json(message: Message) -> None:
    from google.protobuf.json_format import MessageToJson

    text = MessageToJson(message, preserving_proto_field_name=True, indent=None, ensure_ascii=False)
    print(text, flush=True)


def _tasks(text: str) -> dict[str, float]:
    """`math,nlu:0.5` → {"math": 1.0, "nlu": 0.5}."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            raise argparse.ArgumentTypeError(f"{weight!r} is not a weight; write name:number, as in math:0.5") from None
        if name in weights:
            raise argparse.ArgumentTypeError(f"task {name!r} is named twice")
        weights[name] = value
    return weights


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


if __name__ == "__main__":
    sys.exit(main())
