"""`loraf-client`: requests to a loraf-serve server from the shell. Parses the command line before it imports grpc."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf import __version__
from loraf.errors import ConfigError, LorafError, Problem
from loraf_serve.addresses import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from loraf.set_text import SetText
    from loraf_serve.client import Client
    from loraf_serve.v1 import adapter_pb2, generation_pb2

TOKEN_VARIABLE = "LORAF_TOKEN"
DEFAULT_WAIT = 600.0  # seconds; a large model takes minutes to load
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
    server.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the bearer token and nothing else (default: the token in {TOKEN_VARIABLE}, if set)",
    )
    server.add_argument(
        "--insecure-token",
        action="store_true",
        help="send the token to another machine without TLS (default: refuse)",
    )
    server.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="how often a request that changes nothing is sent again, from 0 to 4, if the server is unavailable or its "
        "queue is full (default: 3)",
    )
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
        type=_task_set,
        metavar="SET",
        help="use exactly this task set: tasks such as math+nlu:0.5, a named set, as_trained=TASK, all, or base; a "
        "comma may be written for + (default: all tasks, weight 1)",
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
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="answer in JSON that follows the JSON schema in this file"
    )
    form.add_argument("--regex", metavar="PATTERN", help="answer with text that matches this regular expression")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="answer with one of these texts; repeat it for each of them"
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 on success, 2 for a user error, 1 if the server failed or is not serving.
    """
    arguments = parser().parse_args(argv)
    from loraf_serve.client import ServiceError

    try:
        with _client(arguments) as client:
            return _COMMANDS[arguments.command](client, arguments)
    except ServiceError as error:
        print(f"loraf-client: {error}", file=sys.stderr)
        if error.request_id:
            print(f"loraf-client: in the server's log: request {error.request_id}", file=sys.stderr)
        # A full queue is not a user error; a checkpoint too large for the server is.
        too_large = error.code == "RESOURCE_EXHAUSTED" and arguments.command == "load"
        return 2 if error.code in _USER_ERRORS or too_large else 1
    except (LorafError, ValueError) as error:  # a number out of the field's range, or a prompt that is not Unicode text
        print(f"loraf-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a file that an option names
        print(f"loraf-client: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _client(arguments: argparse.Namespace) -> Client:
    from loraf_serve.client import Client

    retries = {} if arguments.retries is None else {"retries": arguments.retries}
    return Client(
        arguments.server,
        tls=arguments.tls,
        tls_ca=arguments.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        token=_token(arguments.token_file),
        insecure_token=arguments.insecure_token,
        timeout=arguments.timeout,
        **retries,
    )


def _token(file: Path | None) -> str | None:
    """The token in the file, else in the environment. Never an argument: other users see those in the process list."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    words = _read("--token-file", file).split()
    if len(words) != 1:
        remedy = "write the token into it and nothing else"
        raise ConfigError(Problem(f"holds {len(words)} words instead of a token", "--token-file", str(file), remedy))
    return words[0]


def _read(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(Problem("is not text in UTF-8", option, str(file), "give a text file")) from None


def _generate(client: Client, arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "regex", "choice")
    request = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    request |= {
        "adapter": arguments.adapter,
        **_selection(client, arguments),
        "apply_task_template": arguments.task_template,
    }
    if arguments.json_schema:
        request["json_schema"] = _read("--json-schema", arguments.json_schema)
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


def _selection(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """The task set as arguments of `request_of`. Asks the server whether a name is a named set."""
    tasks: SetText | None = arguments.tasks
    if tasks is None:
        return {"as_trained": arguments.as_trained, "base": arguments.base}
    if tasks.kind in ("all", "base"):
        return {"base": tasks.kind == "base"}
    if tasks.kind == "as_trained":
        return {"as_trained": tasks.name}
    if tasks.name:
        adapters = client.adapters()
        adapter = next((a for a in adapters if arguments.adapter in (a.name, "")), None)
        if adapter and any(named.name == tasks.name for named in adapter.sets):
            return {"named": tasks.name}
    return {"tasks": dict(tasks.pairs)}


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


def _info(client: Client, arguments: argparse.Namespace) -> int:
    info = client.server_info()
    if arguments.json:
        _print_json(info.response)
        return 0
    rows = info.rows()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    return 0


def _health(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.wait is not None:
        client.wait_until_serving(arguments.wait)
    state = client.health()
    print(f'{{"status": "{state}"}}' if arguments.json else state)
    return 0 if state == "SERVING" else 1


_COMMANDS = {
    "generate": _generate,
    "adapters": _adapters,
    "load": _load,
    "unload": _unload,
    "info": _info,
    "health": _health,
}


def _print_adapter(adapter: adapter_pb2.Adapter, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json(adapter)
        return
    from loraf.units import size_text
    from loraf_serve.client.results import set_text
    from loraf_serve.v1 import adapter_pb2

    size = size_text(adapter.resident_bytes)
    print(f"{adapter.name}: rank {adapter.rank}, base {adapter.base_model}, digest {adapter.digest}, {size} in memory")
    for task in adapter.tasks:
        earlier = f", trained on top of {'+'.join(task.trained_with)}" if task.trained_with else ""
        print(f"  {task.name}: {task.parameters:,} parameters, alpha {task.alpha:g}{earlier}")
    for named in adapter.sets:
        origin = adapter_pb2.SetOrigin.Name(named.origin).removeprefix("SET_ORIGIN_").lower()
        print(f"  named set {named.name} = {set_text(named.tasks)} (from the {origin})")


def _print_served_by(
    response: generation_pb2.GenerateResponse | generation_pb2.StreamGenerateResponse, finish_reason: str
) -> None:
    """Prints on standard error which tasks answered; standard output holds only the answer."""
    served_by, usage = response.served_by, response.usage
    from loraf_serve.client.results import set_text

    tasks = set_text(served_by.tasks)
    adapter = f"{served_by.adapter}@{served_by.digest[:12]}, " if served_by.adapter else ""
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    print(f"[{tasks}; {adapter}{served_by.backend}; {tokens}; {finish_reason}; {response.request_id}]", file=sys.stderr)


def _print_json(message: Message) -> None:
    from google.protobuf.json_format import MessageToJson

    text = MessageToJson(message, preserving_proto_field_name=True, indent=None, ensure_ascii=False)
    print(text, flush=True)


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


if __name__ == "__main__":
    sys.exit(main())
