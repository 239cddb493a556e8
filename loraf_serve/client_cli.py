"""`loraf-client`: requests to a loraf-serve server from the shell. Parses the command line before it imports grpc."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loraf.errors import ConfigError, LorafError, Problem
from loraf_serve.client_options import DEFAULT_WAIT as DEFAULT_WAIT
from loraf_serve.client_options import TOKEN_VARIABLE
from loraf_serve.client_options import parser as parser

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from loraf.set_text import SetText
    from loraf_serve.client import AsyncClient, Client
    from loraf_serve.v1 import adapter_pb2, generation_pb2

    AnyClient = TypeVar("AnyClient", Client, AsyncClient)

_TOOLS_REMEDY = 'write [{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}]'
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 on success, 2 for a user error, 1 if the server failed or is not serving.
    """
    arguments = parser().parse_args(argv)
    from loraf_serve.client import Client, ServiceError

    try:
        if arguments.command == "chat":
            return _chat(arguments)
        with _client(Client, arguments) as client:
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


def _client(kind: type[AnyClient], arguments: argparse.Namespace) -> AnyClient:
    retries = {} if arguments.retries is None else {"retries": arguments.retries}
    return kind(
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
    names = ("regex", "choice")
    request = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    request |= {
        "adapter": arguments.adapter,
        **_sampling(arguments),
        **_selection(client, arguments),
        "apply_task_template": arguments.task_template,
    }
    text: str | None = prompt
    if arguments.tools:
        request["tools"] = _tools(arguments.tools)
    if arguments.chat or arguments.tools:
        request["messages"], text = [{"role": "user", "content": prompt}], None
    if arguments.json_schema:
        request["json_schema"] = _read("--json-schema", arguments.json_schema)
    if arguments.no_stream:
        answer = client.generate(text, **request)
        if arguments.json:
            _print_json(answer.response)
        else:
            print(answer.text)
            _print_served_by(answer.response, answer.finish_reason)
        return 0
    piece = None
    for piece in client.stream(text, **request):
        if arguments.json:
            _print_json(piece.response)
        else:
            print(piece.text, end="", flush=True)
    if piece and not arguments.json:
        print()
        _print_served_by(piece.response, piece.finish_reason)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from loraf_serve.chat.run import chat
    from loraf_serve.client import AsyncClient

    task_set = f"as_trained={arguments.as_trained}" if arguments.as_trained else "base" if arguments.base else ""
    if arguments.tasks:
        task_set = str(arguments.tasks)
    client = _client(AsyncClient, arguments)
    return chat(client, arguments.adapter, task_set, _sampling(arguments), arguments.system or "")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "priority")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _tools(file: Path) -> list[Mapping[str, Any]]:
    """The tools in a file. What is wrong with one of them is the server's to say."""
    try:
        tools = json.loads(_read("--tools", file))
    except ValueError as error:
        raise ConfigError(Problem(f"is not JSON ({error})", "--tools", str(file), _TOOLS_REMEDY)) from None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(Problem("is not a list of tools", "--tools", str(file), _TOOLS_REMEDY))
    return tools


def _selection(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """The task set as arguments of `request_of`. Asks the server whether a name is a named set."""
    tasks: SetText | None = arguments.tasks
    if tasks is None:
        return {"as_trained": arguments.as_trained, "base": arguments.base}
    from loraf_serve.client.set_arguments import adapter_named, set_arguments

    may_be_named = tasks.kind == "tasks" and tasks.name
    return set_arguments(tasks, adapter_named(arguments.adapter, client.adapters()) if may_be_named else None)


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


if __name__ == "__main__":
    sys.exit(main())
