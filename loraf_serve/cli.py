"""`loraf-serve`: serves LoRAF checkpoints over gRPC; each request chooses its tasks.

Everything heavy is imported after the command line has been read, so that `--help` is quick.
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

if TYPE_CHECKING:
    from loraf_serve.adapters.registry import Registry
    from loraf_serve.adapters.root import AdapterRoot
    from loraf_serve.service.options import ServerOptions

_EPILOG = """\
Every other option goes to vLLM's engine (--tensor-parallel-size, --dtype, --max-model-len, …); the merged backend
knows --dtype and --max-model-len of them.

  loraf-serve --model tiny --adapter ./ckpt
  loraf-serve --model mistral-7b --adapter prod=./ckpt@math+nlu --adapter org/other-adapter --dtype bfloat16
"""


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="loraf-serve",
        description="Serves LoRAF checkpoints over gRPC (loraf.v1); each request chooses its tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    new.add_argument("--version", action="version", version=f"loraf {__version__}")

    what = new.add_argument_group("what is served")
    what.add_argument(
        "--model", required=True, help="base model: a folder, a hub id, or a short name (tiny, mistral-7b, …)"
    )
    what.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]CKPT[@task+task]",
        help="a checkpoint: a folder or a hub id; after @ only those tasks are read. May be repeated; "
        "without any, only the base model answers",
    )
    what.add_argument(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="let clients load the checkpoints below this folder, replace them and unload adapters while the server "
        "runs (default: what is loaded stays)",
    )
    what.add_argument(
        "--adapter-memory",
        type=_size,
        metavar="SIZE",
        help="memory that adapters may take in all, such as 2GiB or 500MiB (default: no limit)",
    )
    what.add_argument(
        "--allow-other-base", action="store_true", help="serve adapters on a model they were not trained for"
    )
    what.add_argument(
        "--backend",
        choices=choose_backend.CHOICES,
        default="auto",
        help="resident: vLLM, one adapter for every task set; slots: vLLM, one LoRA slot for each distinct task set; "
        "merged: transformers, the task set added to the weights; auto: the first of these that can serve the model "
        "(default: auto)",
    )

    where = new.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    where.add_argument("--port", type=int, default=50051, help="0 takes a free port (default: 50051)")
    where.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate of the server")
    where.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    where.add_argument("--tls-client-ca", type=Path, metavar="PEM", help="clients need a certificate signed by this")
    where.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS")
    where.add_argument("--reflection", action="store_true", help="let clients ask for the protocol (gRPC reflection)")

    limits = new.add_argument_group("limits")
    limits.add_argument(
        "--max-queue",
        type=int,
        default=1024,
        metavar="N",
        help="requests in flight at most, waiting and running; more are told when to try again (default: 1024)",
    )
    limits.add_argument(
        "--max-message-bytes", type=int, default=4 << 20, metavar="N", help="largest request (default: 4194304)"
    )
    limits.add_argument(
        "--default-deadline",
        type=float,
        metavar="SECONDS",
        help="for requests that bring no deadline (default: none, they take as long as they take)",
    )
    limits.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long requests in flight may go on after SIGTERM or Ctrl-C; a second signal ends it (default: 30)",
    )
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 2 on a user's mistake, 1 if the engine died."""
    arguments, engine_options = parser().parse_known_args(argv)
    try:
        return _serve(arguments, engine_options)
    except LorafError as error:
        print(f"loraf-serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the server took over the signals
        return 130


def _serve(arguments: argparse.Namespace, engine_options: list[str]) -> int:
    options, model_folder, vocab_size, registry, root = _prepare(arguments, engine_options)
    for adapter in registry:
        rank, tasks = adapter.manifest.rank, ", ".join(adapter.tasks)
        _say(f"adapter {adapter.name}: verified, rank {rank}, digest {adapter.digest[:12]}, tasks {tasks}")

    import asyncio
    import logging

    from loraf_serve.service import server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    max_rank = max((adapter.manifest.rank for adapter in registry), default=1)
    chosen = choose_backend.choose(
        arguments.backend, model_folder, engine_options, max_rank, _say, options.adapter_memory
    )
    _say(f"backend {chosen.backend.name}: {chosen.why}")
    if chosen.backend.reads_checkpoints:
        registry = registry.manifests_alone()
    return asyncio.run(server.run(chosen.backend, registry, options, vocab_size, root, _say))


def _prepare(
    arguments: argparse.Namespace, engine_options: list[str]
) -> tuple[ServerOptions, Path, int | None, Registry, AdapterRoot | None]:
    """Everything that can be refused before an engine starts.

    Returns:
        Options, the model's folder, its number of token ids (None if its config does not say), the adapters, where
        clients may load more from.

    Raises:
        ConfigError: every mistake found.
    """
    import dataclasses

    from loraf_serve.service.options import ServerOptions

    options = ServerOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ServerOptions)})
    problems = options.problems()
    if engine_options and not engine_options[0].startswith("-"):
        remedy = "checkpoints come after --adapter; see loraf-serve --help"
        problems.append(Problem("is no option", engine_options[0], remedy=remedy))

    from loraf import base_model
    from loraf_serve.adapters.registry import Registry, open_all, parse_spec
    from loraf_serve.adapters.root import AdapterRoot

    registry, vocab_size, root = Registry(), None, None
    try:
        model_folder = base_model.resolve(arguments.model, field="--model")
        vocab_size = _vocab_size(model_folder)
    except ConfigError as error:
        model_folder = Path()
        problems += error.problems
        for text in arguments.adapter:
            try:
                parse_spec(text)
            except ConfigError as wrong:
                problems += wrong.problems
    else:
        try:
            registry = open_all(arguments.adapter, model_folder, arguments.allow_other_base)
        except ConfigError as error:
            problems += error.problems
    try:
        if arguments.adapter_root:
            root = AdapterRoot(arguments.adapter_root, model_folder, arguments.allow_other_base)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return options, model_folder, vocab_size, registry, root


def _vocab_size(model_folder: Path) -> int | None:
    import json

    file = model_folder / "config.json"
    try:
        config = json.loads(file.read_text())
        config = config.get("text_config", config)
        size = config.get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        remedy = "restore the model's config.json"
        raise ConfigError(Problem(f"cannot be read ({error})", file=str(file), remedy=remedy)) from None
    return size if isinstance(size, int) else None


def _size(text: str) -> int:
    from loraf_serve.adapters.memory import parse_size

    try:
        return parse_size(text)
    except ValueError:
        message = f"{text!r} is no size; write a number of bytes, or 500MiB, or 2GiB"
        raise argparse.ArgumentTypeError(message) from None


def _say(line: str) -> None:
    print(f"loraf-serve: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
