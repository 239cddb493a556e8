"""`loraf-client`: asks a loraf-serve server from the shell. grpc is imported after the command line has been read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import __version__

if TYPE_CHECKING:
    from loraf_serve.client import Client
    from loraf_serve.v1 import adapter_pb2, generation_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MAX_TOKENS = 256  # the server's own default, 16, is vLLM's and cuts most answers short
# The user's to mend: exit status 2. Everything else is a fault of the server or of the way to it: 1.
_USERS_MISTAKES = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "ALREADY_EXISTS",
    "DATA_LOSS",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
}


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(prog="loraf-client", description="Asks a loraf-serve server.", allow_abbrev=False)
    new.add_argument("--version", action="version", version=f"loraf {__version__}")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"default: {DEFAULT_ADDRESS}")
    server.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up after this (default: never)")
    server.add_argument("--tls", action="store_true", help="speak TLS and trust the system's authorities")
    server.add_argument("--tls-ca", type=Path, metavar="PEM", help="speak TLS and trust this authority")
    server.add_argument("--tls-cert", type=Path, metavar="PEM", help="this client's certificate")
    server.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    server.add_argument("--json", action="store_true", help="print messages as JSON, one a line")
    commands = new.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[server], help="generate text", allow_abbrev=False)
    generate.add_argument("prompt", help="the text; - reads it from standard input")
    generate.add_argument("--adapter", default="", help="its name (default: the only one loaded)")
    which = generate.add_mutually_exclusive_group()
    which.add_argument(
        "--tasks", type=_tasks, metavar="A,B[:WEIGHT]", help="exactly these tasks, for example math,nlu:0.5"
    )
    which.add_argument("--as-trained", metavar="TASK", help="the model as it was when this task had been trained")
    which.add_argument("--base", action="store_true", help="the base model alone (default: all tasks)")
    generate.add_argument(
        "--task-template", action="store_true", help="wrap the prompt as the one chosen task was trained"
    )
    generate.add_argument(
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N", help=f"default: {DEFAULT_MAX_TOKENS}"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="default: 0, greedy, so that the answers of two task sets can be compared",
    )
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")
    generate.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")

    commands.add_parser("adapters", parents=[server], help="what is loaded", allow_abbrev=False)
    load = commands.add_parser(
        "load", parents=[server], help="load a checkpoint while the server runs (needs --adapter-root there)"
    )
    load.add_argument("name", help="what requests will call it")
    load.add_argument("path", help="the checkpoint's folder, relative to the server's --adapter-root")
    load.add_argument("--tasks", type=_names, metavar="A,B", help="read only these (default: all)")
    load.add_argument(
        "--replace", action="store_true", help="the name may be taken; requests that run end on the old content"
    )
    unload = commands.add_parser("unload", parents=[server], help="unload an adapter (needs --adapter-root there)")
    unload.add_argument("name")
    commands.add_parser("health", parents=[server], help="exit status 0 if the server serves, else 1")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 on success, 2 on a user's mistake, 1 if the server failed or does not serve."""
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
        # A full queue is nobody's mistake; a checkpoint too large for the server is.
        too_large = error.code == "RESOURCE_EXHAUSTED" and arguments.command == "load"
        return 2 if error.code in _USERS_MISTAKES or too_large else 1
    except ValueError as error:  # a number that the protocol has no room for, or a prompt that is no Unicode text
        print(f"loraf-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads our output has had enough
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
    found = client.unload_adapter(arguments.name)
    if arguments.json:
        _print_json(found)
        return 0
    count = found.running_requests
    keep = [f"the last of {count} running request{'s' * (count > 1)} has ended"] if count else []
    keep += [f"{', '.join(found.other_names)} (the same content) is unloaded too"] if found.other_names else []
    print(
        f"{arguments.name}: unloaded; its memory {'is freed when ' + ' and '.join(keep) if keep else 'has been freed'}"
    )
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
    from loraf_serve.adapters.memory import size_text

    size = size_text(adapter.resident_bytes)
    print(f"{adapter.name}: rank {adapter.rank}, base {adapter.base_model}, digest {adapter.digest}, {size} in memory")
    for task in adapter.tasks:
        below = f", trained on top of {'+'.join(task.trained_with)}" if task.trained_with else ""
        print(f"  {task.name}: {task.parameters:,} parameters, alpha {task.alpha:g}{below}")


def _print_served_by(
    response: generation_pb2.GenerateResponse | generation_pb2.StreamGenerateResponse, finish_reason: str
) -> None:
    """Says on standard error what has answered; standard output holds the answer alone."""
    by, usage = response.served_by, response.usage
    tasks = "+".join(t.name if t.weight == 1 else f"{t.name}:{t.weight:g}" for t in by.tasks) or "base"
    adapter = f"{by.adapter}@{by.digest[:12]}, " if by.adapter else ""
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    print(f"[{tasks}; {adapter}{by.backend}; {tokens}; {finish_reason}]", file=sys.stderr)


def _print_json(message) -> None:
    from google.protobuf.json_format import MessageToJson

    text = MessageToJson(message, preserving_proto_field_name=True, indent=None, ensure_ascii=False)
    print(text, flush=True)


def _tasks(text: str) -> dict[str, float]:
    """`math,nlu:0.5` → {"math": 1.0, "nlu": 0.5}."""
    chosen: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            raise argparse.ArgumentTypeError(f"{weight!r} is no weight; write name:number, as in math:0.5") from None
        if name in chosen:
            raise argparse.ArgumentTypeError(f"task {name!r} is named twice")
        chosen[name] = value
    return chosen


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
