"""`loraf-serve`: serves LoRAF checkpoints over gRPC and HTTP; each request selects its tasks.

Heavy modules are imported after the command line has been parsed, to keep `--help` fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import __version__
from loraf.errors import ConfigError, LorafError, Problem
from loraf_serve import choose_backend
from loraf_serve.addresses import DEFAULT_HOST, DEFAULT_PORT, is_local
from loraf_serve.backends.backend import BackendUnavailable, EngineFailed
from loraf_serve.security.tokens import Tokens
from loraf_serve.service.server_options import (
    DEFAULT_GRACE,
    DEFAULT_MAX_CONNECTION_AGE,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_MAX_QUEUE,
    LOG_FORMATS,
    ServerOptions,
)

if TYPE_CHECKING:
    from loraf_serve.adapters.registry import Registry
    from loraf_serve.adapters.root import AdapterRoot

_EPILOG = """\
All other options are passed to vLLM's engine (--tensor-parallel-size, --dtype, --max-model-len, …). The merged backend
accepts --dtype and --max-model-len only.

  loraf-serve --model tiny --adapter ./ckpt
  loraf-serve --model mistral-7b --adapter prod=./ckpt@math+nlu --adapter org/other-adapter --dtype bfloat16

loraf-serve check, with the same options, tells whether the model and the adapters fit, and starts nothing.
"""


_CHECK = "check"
_CHECK_EPILOG = """\
Takes the options of loraf-serve. Exits with 0 if a start with them would fit, and with 2 if not. Models and adapters on
the hub are downloaded, as at a start; no engine is started.

  loraf-serve check --model tiny --adapter ./ckpt
"""


def check_parser() -> argparse.ArgumentParser:
    """The command line of `loraf-serve check`: the server's options, and its own."""
    command = parser()
    command.prog = f"loraf-serve {_CHECK}"
    command.description = "Check whether a server with these options would fit: where, on which backend, and why."
    command.epilog = _CHECK_EPILOG
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as one JSON object (default: text)")
    return command


def parser() -> argparse.ArgumentParser:
    """The command line of `loraf-serve`. Imports neither torch nor vLLM."""
    command = argparse.ArgumentParser(
        prog="loraf-serve",
        description="Serve LoRAF checkpoints over gRPC (loraf.v1) and OpenAI's API. Each request selects its tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--version", action="version", version=f"loraf {__version__}")

    models = command.add_argument_group("models and adapters")
    models.add_argument(
        "--model",
        required=True,
        help="base model: a folder, a Hugging Face hub id, or a short name (tiny, mistral-7b, …)",
    )
    models.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of the model and its tokenizer on the hub (default: its main branch)",
    )
    models.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]CKPT[#REVISION][@task+task]",
        help="checkpoint to serve: a folder or a hub id, optionally with a name before =, a hub id's branch, tag or "
        "commit after #, and tasks after @; may be repeated (default: none, only the base model answers)",
    )
    models.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="[ADAPTER/]NAME=SET",
        help="task set that requests may select by NAME, for example support=math+nlu:0.5; it replaces the set of that "
        "name in the checkpoint; without ADAPTER/, every adapter with all of its tasks has it, and so have adapters "
        "that are loaded later; may be repeated (default: only the sets stored in the checkpoints)",
    )
    models.add_argument(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="folder below which clients may load, replace and unload checkpoints while the server runs "
        "(default: clients cannot change what is loaded)",
    )
    models.add_argument(
        "--adapter-memory",
        type=_size,
        metavar="SIZE",
        help="limit on the memory of all adapters together, in bytes or with a unit such as 500MB or 2GiB "
        "(default: no limit)",
    )
    models.add_argument(
        "--allow-other-base", action="store_true", help="serve adapters that were trained for another base model"
    )
    models.add_argument(
        "--backend",
        choices=choose_backend.CHOICES,
        default="auto",
        help="resident: vLLM, all task sets share one adapter; slots: vLLM, one LoRA slot per distinct task set; "
        "merged: transformers, the task set is added to the weights; auto: the first of these that can serve the model "
        "(default: auto)",
    )

    network = command.add_argument_group("network")
    network.add_argument(
        "--host",
        default=DEFAULT_HOST,
        help=f"address to listen on, or a Unix socket such as unix:/run/loraf.sock, which has no port "
        f"(default: {DEFAULT_HOST}, this machine only)",
    )
    network.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help=f"TCP port to listen on, 0 for any free port (default: {DEFAULT_PORT})",
    )
    network.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate of the server (default: no TLS)")
    network.add_argument("--tls-key", type=Path, metavar="PEM", help="private key of --tls-cert, not encrypted")
    network.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="PEM",
        help="authority that must have signed the clients' certificates (default: clients need no certificate)",
    )
    network.add_argument(
        "--insecure", action="store_true", help="allow connections from other machines without TLS (default: refuse)"
    )
    network.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="tokens of the clients that may call, one per line: TOKEN [name=NAME] [adapter=A,B] [tasks=x,y] [load] "
        "[priority] [in-flight=N] [tokens-per-minute=N]; read again when it changes (default: everybody may call)",
    )
    network.add_argument(
        "--max-connection-age",
        type=float,
        default=DEFAULT_MAX_CONNECTION_AGE,
        metavar="SECONDS",
        help="time after which a client is asked to connect again, in seconds, so that load balancers can share out "
        f"connections; running requests are not cut off; 0 for never (default: {DEFAULT_MAX_CONNECTION_AGE:g})",
    )
    network.add_argument(
        "--reflection", action="store_true", help="offer gRPC reflection, by which clients can query the protocol"
    )
    network.add_argument(
        "--vllm-grpc",
        action="store_true",
        help="also speak vLLM's own gRPC contract (vllm.Inference and vllm.Control, as of vLLM 0.32) on the same port, "
        "where lora_name is a set of tasks such as ckpt@math:0.5+nlu (default: loraf.v1 only)",
    )

    http = command.add_argument_group("HTTP")
    http.add_argument(
        "--http-port",
        type=int,
        metavar="PORT",
        help="serve OpenAI's API, and a page at /, over HTTP on this port of --host, with the same tokens, limits and "
        "certificates; a model's name is a set of tasks, such as ckpt@math:0.5+nlu; 0 for any free port "
        "(default: no HTTP)",
    )
    http.add_argument(
        "--http-allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may call over HTTP, such as https://app.example.org; may be repeated "
        "(default: only the server's own page)",
    )
    http.add_argument(
        "--tool-call-parser",
        default="",
        metavar="NAME",
        help="vLLM's parser for calls of tools in answers to chats, such as hermes or mistral; models may then call "
        "tools by themselves (default: calls of tools stay text)",
    )

    limits = command.add_argument_group("limits")
    limits.add_argument(
        "--max-queue",
        type=int,
        default=DEFAULT_MAX_QUEUE,
        metavar="N",
        help="limit on requests in flight, waiting and running; further requests are refused with a time to retry "
        f"(default: {DEFAULT_MAX_QUEUE})",
    )
    limits.add_argument(
        "--max-message-bytes",
        type=int,
        default=DEFAULT_MAX_MESSAGE_BYTES,
        metavar="N",
        help=f"size limit of a request, in bytes (default: {DEFAULT_MAX_MESSAGE_BYTES})",
    )
    limits.add_argument(
        "--default-deadline",
        type=float,
        metavar="SECONDS",
        help="deadline of requests that set none, in seconds (default: none)",
    )
    limits.add_argument(
        "--grace",
        type=float,
        default=DEFAULT_GRACE,
        metavar="SECONDS",
        help="time that requests in flight may continue after SIGTERM or Ctrl-C and --drain-delay, in seconds; a "
        f"second signal ends it (default: {DEFAULT_GRACE:g})",
    )
    limits.add_argument(
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="time after SIGTERM or Ctrl-C in which the server says NOT_SERVING but still accepts requests, in "
        "seconds, so that a load balancer turns to other servers first (default: 0)",
    )

    logs = command.add_argument_group("metrics and logs")
    logs.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="serve metrics for Prometheus over HTTP on this port of --host, at /metrics, with the same tokens and "
        "certificates; 0 for any free port (default: no metrics)",
    )
    logs.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="log lines as text, or as JSON objects (default: text)",
    )
    logs.add_argument(
        "--log-texts", action="store_true", help="write prompts and answers to the log (default: neither)"
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 after a clean stop, 2 for a user error, 1 if the engine failed to start or died.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    is_check = argv[:1] == [_CHECK]
    arguments, engine_options = (check_parser() if is_check else parser()).parse_known_args(argv[is_check:])
    try:
        return _check(arguments, engine_options) if is_check else _serve(arguments, engine_options)
    except LorafError as error:
        print(f"loraf-serve: {error}", file=sys.stderr)
        return 1 if isinstance(error, EngineFailed) else 2
    except BackendUnavailable as error:  # the engine died after its start, while adapters were loaded
        print(f"loraf-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the server handles signals
        return 130


def _serve(arguments: argparse.Namespace, engine_options: list[str]) -> int:
    options, model_folder, vocab_size, registry, root = _prepare(arguments, engine_options)
    import asyncio

    from loraf.hub import loaded_from_hub
    from loraf_serve.observe import logs
    from loraf_serve.service import server

    logs.configure(options.log_format)
    if options.log_format == "json":
        logs.configure_vllm()
    if commit := loaded_from_hub(model_folder):
        _say(f"model {commit}")
    for adapter in registry:
        if commit := loaded_from_hub(adapter.path):
            _say(f"adapter {adapter.name}: {commit}")
    max_rank = max((adapter.manifest.rank for adapter in registry), default=1)
    choice = choose_backend.choose(
        arguments.backend, model_folder, engine_options, max_rank, _say, options.adapter_memory
    )
    _say(f"backend {choice.backend.name}: {choice.reason}")
    doors = []
    if options.http_port is not None:
        from loraf_serve.http.door import door

        doors.append(door(options.http_port, tuple(options.http_allowed_origin), options.tool_call_parser))
    return asyncio.run(server.run(choice.backend, registry, options, vocab_size, root, _say, doors))


def _check(arguments: argparse.Namespace, engine_options: list[str]) -> int:
    from loraf_serve.check import command

    try:
        options, model_folder, _, registry, _ = _prepare(arguments, engine_options)
    except ConfigError as error:
        result = command.refused(error, arguments.model)
    else:
        start = command.Start(arguments.model, model_folder, arguments.backend, engine_options, registry, options)
        result = command.check(start)
    return result.show(arguments.json)


def _prepare(
    arguments: argparse.Namespace, engine_options: list[str]
) -> tuple[ServerOptions, Path, int | None, Registry, AdapterRoot | None]:
    """Checks everything that can be checked before an engine starts. Reads no task file.

    Returns:
        The options, the model's folder, its number of token ids (None if it does not say), the adapters, and
        the folder from which clients may load more.

    Raises:
        ConfigError: all mistakes.
    """
    import dataclasses

    options = ServerOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ServerOptions)})
    problems = options.problems()
    if arguments.adapter_root and not options.token_file and not is_local(options.host):
        message = f"{options.host} can be reached from other machines, and anybody there could load adapters"
        problems.append(Problem(message, "--adapter-root", remedy="give --token-file with a token that says load"))
    if options.token_file:
        try:
            Tokens(options.token_file)
        except ConfigError as error:
            problems += error.problems
    if engine_options and not engine_options[0].startswith("-"):
        remedy = "checkpoints come after --adapter; see loraf-serve --help"
        problems.append(Problem("is not an option", engine_options[0], remedy=remedy))

    from loraf import base_model
    from loraf_serve.adapters.adapter_spec import check_adapters, parse_spec
    from loraf_serve.adapters.named_sets import OperatorSets
    from loraf_serve.adapters.registry import Registry
    from loraf_serve.adapters.root import AdapterRoot
    from loraf_serve.backends import vocabulary

    registry, vocab_size, root = Registry(), None, None
    sets = OperatorSets()
    try:
        sets = OperatorSets.parse(arguments.sets)
    except ConfigError as error:
        problems += error.problems
    try:
        if arguments.revision is not None:
            base_model.require_revision(arguments.model, arguments.revision, "--revision")
        model_folder = base_model.resolve(arguments.model, arguments.revision, field="--model")
        vocab_size = vocabulary.vocab_size(model_folder)
    except ConfigError as error:
        model_folder = Path()
        problems += error.problems
        for text in arguments.adapter:
            try:
                parse_spec(text)
            except ConfigError as spec_error:
                problems += spec_error.problems
    else:
        try:
            registry = check_adapters(arguments.adapter, model_folder, arguments.allow_other_base).with_sets(sets)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += sets.problems(tuple(registry), may_load=arguments.adapter_root is not None)
    try:
        if arguments.adapter_root:
            root = AdapterRoot(arguments.adapter_root, model_folder, arguments.allow_other_base)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    from loraf.hub import public_name

    options = dataclasses.replace(options, model=public_name(model_folder))  # not a path of this machine
    return options, model_folder, vocab_size, registry, root


def _size(text: str) -> int:
    from loraf.units import parse_size

    try:
        return parse_size(text)
    except ValueError:
        message = f"{text!r} is not a size: write a number of bytes, or for example 500MB or 2GiB"
        raise argparse.ArgumentTypeError(message) from None


def _say(line: str) -> None:
    print(f"loraf-serve: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
