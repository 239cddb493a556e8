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
CHECKPOINT = "the checkpoint: a folder, or a name of the hub"
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
    from loraf_train.commands.run import run

    return run(options.file, options.set, not options.no_eval, options.eval_limit)


def _check(options: argparse.Namespace) -> int:
    from loraf_train.commands.check import check

    return check(options.file, options.set)


def _eval(options: argparse.Namespace) -> int:
    from loraf_train.commands.eval import evaluate

    return evaluate(
        options.file, options.set, options.tasks, options.as_trained, options.base, options.limit, options.json
    )


def _compare(options: argparse.Namespace) -> int:
    from loraf_train.commands.compare import compare

    return compare(
        options.file, options.set, options.methods, options.protocol, options.seeds, options.out, options.eval_limit
    )


def _inspect(options: argparse.Namespace) -> int:
    from loraf_train.commands.inspect import inspect

    return inspect(_here(options.checkpoint), options.verify, options.json, options.layers)


def _export(options: argparse.Namespace) -> int:
    from loraf_train.commands.export import export

    return export(
        _here(options.checkpoint),
        options.out,
        options.format,
        options.tasks,
        options.as_trained,
        options.model,
        options.dtype,
        options.allow_other_base,
    )


def _import(options: argparse.Namespace) -> int:
    from loraf_train.commands.import_ import import_task

    return import_task(
        options.folder,
        options.into,
        options.name,
        options.tasks,
        options.sparsity,
        options.dtype,
        options.allow_lossy,
        options.allow_other_base,
    )


def _remove(options: argparse.Namespace) -> int:
    from loraf_train.commands.remove import remove

    return remove(options.checkpoint, options.task, options.dry_run)


def _card(options: argparse.Namespace) -> int:
    from loraf_train.commands.push import card

    return card(options.checkpoint, options.write, options.name)


def _push(options: argparse.Namespace) -> int:
    from loraf_train.commands.push import push

    return push(options.checkpoint, options.repository, options.private, options.revision, options.message)


def _here(checkpoint: str) -> Path:
    """A checkpoint's folder, downloaded where it is a name of the hub."""
    from loraf.hub import checkpoint_folder

    return checkpoint_folder(checkpoint)


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

    compare = _of_file(
        commands, "compare", _compare, "train the file's tasks with several methods and seeds; tables and pictures"
    )
    compare.add_argument(
        "--methods",
        default="loraf,lora,full",
        metavar="A,B",
        help="of loraf, random-mask, frozen-a, lora, full (default: %(default)s)",
    )
    compare.add_argument(
        "--protocol",
        choices=("single", "sequence"),
        required=True,
        help="each task alone from the base, or one after the other",
    )
    compare.add_argument("--seeds", metavar="N,N", help="instead of the file's compare.seeds (0,1,2)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="instead of the file's OUTPUT-compare/PROTOCOL")
    compare.add_argument("--eval-limit", type=_count, metavar="N", help="use at most N examples of each evaluation set")

    inspect = commands.add_parser("inspect", help="show what a checkpoint holds", description="Shows a checkpoint.")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    inspect.add_argument("--verify", action="store_true", help="read every file, rebuild every A, check every digest")
    inspect.add_argument("--layers", action="store_true", help="sparsity of every module, not only of each projection")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser(
        "export", help="write a task set as a PEFT adapter or a full model", description="Exports a task set."
    )
    export.set_defaults(command=_export)
    export.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
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

    import_ = commands.add_parser(
        "import",
        help="make a foreign adapter a task of a checkpoint",
        description="Adds a LoRA in PEFT's format, or tasks of another LoRAF checkpoint, to a checkpoint, as one task "
        "on free positions. An adapter on the checkpoint's own A is taken over exactly; any other is approximated, and "
        "refused where the approximation is not close.",
    )
    import_.set_defaults(command=_import)
    import_.add_argument("folder", type=Path, metavar="DIR", help="a PEFT LoRA directory, or a LoRAF checkpoint")
    import_.add_argument("--into", type=Path, required=True, metavar="CKPT", help="the checkpoint's folder")
    import_.add_argument("--name", required=True, metavar="T", help="the new task's name")
    import_.add_argument("--tasks", metavar="SET", help=f"of a LoRAF checkpoint: {CHOICES_OF_TASKS}; they become one")
    import_.add_argument(
        "--sparsity",
        type=float,
        metavar="S",
        help="of the new task (default: the adapter's own, or the last task's)",
    )
    import_.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of its values (default: likewise, or what exactness needs)",
    )
    import_.add_argument(
        "--allow-lossy", action="store_true", help="store the nearest that fits, however far from the adapter it is"
    )
    import_.add_argument("--allow-other-base", action="store_true", help="do not insist on the checkpoint's base model")

    remove = commands.add_parser(
        "remove",
        help="take a task out of a checkpoint; its positions are free again",
        description="Takes a task out of a checkpoint. Its values are gone; what it held is free for new tasks. Tasks "
        "that were trained on top of it stay, but can no longer be served as they were trained.",
    )
    remove.set_defaults(command=_remove)
    remove.add_argument("checkpoint", type=Path, metavar="CKPT", help="the checkpoint's folder")
    remove.add_argument("task", metavar="TASK", help="the task's name")
    remove.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")

    card = commands.add_parser(
        "card", help="print a model card for the hub", description="Prints a model card, made from the manifest."
    )
    card.set_defaults(command=_card)
    card.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    card.add_argument("--name", metavar="NAME", help="what the card calls the checkpoint, such as org/name")
    card.add_argument("--write", action="store_true", help="write it into the checkpoint's folder as README.md")

    push = commands.add_parser(
        "push",
        help="upload a checkpoint to the hub",
        description="Checks a checkpoint, and uploads the manifest, its tasks and a model card (the folder's "
        "README.md, or one made from the manifest) in one commit. Nothing else of the folder is uploaded.",
    )
    push.set_defaults(command=_push)
    push.add_argument("checkpoint", type=Path, metavar="CKPT", help="the checkpoint's folder")
    push.add_argument("repository", metavar="REPO", help="org/name; made where it is missing")
    push.add_argument("--private", action="store_true", help="make a missing repository a private one")
    push.add_argument("--revision", metavar="BRANCH", help="an existing branch (default: main)")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
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
