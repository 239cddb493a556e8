"""The command `loraf-train`. Only argparse is imported here: `--help` must not wait for torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loraf import __version__
from loraf.errors import LorafError

USER_MISTAKE, INTERRUPTED = 2, 130
CHOICES_OF_TASKS = "a,b or a:0.5+b (weights) or all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0: done; 2: a mistake of the user, explained on stderr; 130: interrupted. Faults of the program raise, so that
        Python prints the traceback and exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # records hold any character, a terminal perhaps not
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except LorafError as error:
        print(f"loraf-train: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("loraf-train: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    from loraf_train.command_run import run

    return run(options.file, options.set, not options.no_eval, options.eval_limit)


def _check(options: argparse.Namespace) -> int:
    from loraf_train.command_check import check

    return check(options.file, options.set)


def _eval(options: argparse.Namespace) -> int:
    from loraf_train.command_eval import evaluate

    return evaluate(
        options.file, options.set, options.tasks, options.as_trained, options.base, options.limit, options.json
    )


def _inspect(options: argparse.Namespace) -> int:
    from loraf_train.command_inspect import inspect

    return inspect(options.checkpoint, options.verify, options.json, options.layers)


def _export(options: argparse.Namespace) -> int:
    from loraf_train.command_export import export

    return export(
        options.checkpoint,
        options.out,
        options.format,
        options.tasks,
        options.as_trained,
        options.model,
        options.dtype,
        options.allow_other_base,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraf-train",
        description="Trains several tasks in sequence into one small adapter without forgetting; scores it, looks into "
        "it, exports it.",
        epilog="Exit status: 0 done, 2 a mistake of the user (explained on stderr), 1 a fault of the program.",
    )
    parser.add_argument("--version", action="version", version=f"loraf {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    run = _of_file(commands, "run", _run, "train every task of the file that its checkpoint does not have yet")
    run.add_argument("--no-eval", action="store_true", help="measure no scores")
    run.add_argument("--eval-limit", type=_count, metavar="N", help="use at most N examples of each evaluation set")

    _of_file(
        commands, "check", _check, "read everything, show one example a task and what a run would take; no training"
    )

    evaluate = _of_file(commands, "eval", _eval, "score the file's checkpoint; every number says its task set")
    evaluate.add_argument("--tasks", action="append", default=[], metavar="SET", help=f"{CHOICES_OF_TASKS}; repeatable")
    evaluate.add_argument(
        "--as-trained", action="append", default=[], metavar="TASK", help="the set that TASK was trained as; repeatable"
    )
    evaluate.add_argument("--base", action="store_true", help="the base model without any task")
    evaluate.add_argument("--limit", type=_count, metavar="N", help="use at most N examples of each evaluation set")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the scores to FILE too")

    inspect = commands.add_parser("inspect", help="show what a checkpoint holds", description="Shows a checkpoint.")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("checkpoint", type=Path, metavar="CKPT", help="the checkpoint's folder")
    inspect.add_argument("--verify", action="store_true", help="read every file, rebuild every A, check every digest")
    inspect.add_argument("--layers", action="store_true", help="sparsity of every module, not only of each projection")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser(
        "export", help="write a task set as a PEFT adapter or a full model", description="Exports a task set."
    )
    export.set_defaults(command=_export)
    export.add_argument("checkpoint", type=Path, metavar="CKPT", help="the checkpoint's folder")
    chosen = export.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--tasks", metavar="SET", help=CHOICES_OF_TASKS)
    chosen.add_argument("--as-trained", metavar="TASK", help="the set that TASK was trained as")
    export.add_argument("--format", choices=("peft", "merged"), required=True, help="a LoRA directory, or a full model")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    export.add_argument("--model", metavar="M", help="folder, hub id or short name, instead of the checkpoint's base")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of what is written (peft: float32; merged: the base's own)"
    )
    export.add_argument("--allow-other-base", action="store_true", help="do not insist on the checkpoint's base model")
    return parser


def _of_file(commands: argparse._SubParsersAction, name: str, command: object, text: str) -> argparse.ArgumentParser:
    """A command that reads a tasks.yaml."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=command)
    parser.add_argument("file", type=Path, metavar="tasks.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value: training.epochs=1, tasks.math.alpha=32 (a task's own values stay); repeatable",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
