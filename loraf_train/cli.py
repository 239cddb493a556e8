"""The command `loraf-train`. Imports nothing heavy: `--help` must not wait for torch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import __version__
from loraf.errors import LorafError
from loraf_train import dispatch

if TYPE_CHECKING:
    Command = Callable[[argparse.Namespace], int]
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

USER_MISTAKE, INTERRUPTED = 2, 130
CHECKPOINT_OR_HUB_ID = "The checkpoint: a folder, or a repository on the hub (org/name, or org/name#REVISION)."
CHECKPOINT_FOLDER = "The checkpoint's folder."
TASK_SET = "a,b (weight 1), a:0.5+b (other weights), all, or a named set of the checkpoint"
EVAL_LIMIT = "Use at most N examples of each evaluation set (default: all)."
OTHER_BASE = "Accept a base model other than the checkpoint's."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0: done; 2: a user error, explained on stderr; 130: interrupted. Bugs raise, so that Python prints the
        traceback and exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # records may hold characters that the terminal cannot show
            stream.reconfigure(errors="replace")
    # On some CPUs it warns, whenever it is imported, that it could download a faster kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options = build_parser().parse_args(arguments)
    command: Command = options.command
    try:
        return command(options)
    except LorafError as error:
        print(f"loraf-train: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("loraf-train: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line with every subcommand; the reference page is generated from it."""
    parser = argparse.ArgumentParser(
        prog="loraf-train",
        description="Trains several tasks in sequence into one small adapter without forgetting, and scores, inspects "
        "and exports it.",
        epilog="Exit status: 0 done, 2 user error (explained on stderr), 1 internal error, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"loraf {__version__}", help="Print the version.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in (
        _add_run,
        _add_check,
        _add_eval,
        _add_compare,
        _add_inspect,
        _add_export,
        _add_import,
        _add_remove,
        _add_protect,
        _add_tune_weights,
        _add_card,
        _add_push,
    ):
        add(commands)
    return parser


def _add_run(commands: Subcommands) -> None:
    run = _add_file_command(
        commands,
        "run",
        dispatch.run,
        "Train every task of the file that its checkpoint does not have yet, and score them.",
    )
    run.add_argument("--no-eval", action="store_true", help="Train only, and measure no scores.")
    run.add_argument("--eval-limit", type=_positive, metavar="N", help=EVAL_LIMIT)


def _add_check(commands: Subcommands) -> None:
    _add_file_command(
        commands,
        "check",
        dispatch.check,
        "Check the file, the model and all records; print an example of each task, its capacity and a run's memory.",
        "Nothing is trained.",
    )


def _add_eval(commands: Subcommands) -> None:
    evaluate = _add_file_command(
        commands,
        "eval",
        dispatch.eval_,
        "Score the file's checkpoint under one or more task sets (default: all tasks on).",
    )
    evaluate.add_argument(
        "--tasks", action="append", default=[], metavar="SET", help=f"Score this task set: {TASK_SET}; repeatable."
    )
    evaluate.add_argument(
        "--as-trained",
        action="append",
        default=[],
        metavar="TASK",
        help="Score the task set that TASK was trained in; repeatable.",
    )
    evaluate.add_argument("--base", action="store_true", help="Score the base model without any task.")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help=EVAL_LIMIT)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="Also write the scores to FILE as JSON.")


def _add_compare(commands: Subcommands) -> None:
    compare = _add_file_command(
        commands,
        "compare",
        dispatch.compare,
        "Train the file's tasks with several methods and seeds, and write tables and pictures of the results.",
    )
    compare.add_argument(
        "--methods",
        default="loraf,lora,full",
        metavar="A,B",
        help="The methods to compare, of loraf, loraf-paper, random-mask, frozen-a, lora, lora-decay, o-lora, ewc, "
        "replay, separate, joint and full (default: %(default)s).",
    )
    compare.add_argument(
        "--protocol",
        choices=("single", "sequence"),
        required=True,
        help="Train each task alone from the base model (single), or one after the other (sequence).",
    )
    compare.add_argument(
        "--seeds", metavar="N,N", help="The seeds to train with (default: compare.seeds of the file, or else 0,1,2)."
    )
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="The folder for results (default: OUTPUT-compare/PROTOCOL)."
    )
    compare.add_argument("--eval-limit", type=_positive, metavar="N", help=EVAL_LIMIT)
    compare.add_argument(
        "--stored", action="store_true", help="Train nothing: show the runs that the folder for results holds."
    )


def _add_inspect(commands: Subcommands) -> None:
    inspect = _add_command(commands, "inspect", dispatch.inspect, "Show what a checkpoint holds.")
    inspect.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT_OR_HUB_ID)
    inspect.add_argument("--verify", action="store_true", help="Read every file, rebuild every A, check every digest.")
    inspect.add_argument(
        "--layers", action="store_true", help="Show the sparsity of every module (default: of each projection)."
    )
    inspect.add_argument("--json", action="store_true", help="Print JSON.")


def _add_export(commands: Subcommands) -> None:
    export = _add_command(commands, "export", dispatch.export, "Write a task set as a PEFT adapter or a full model.")
    export.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT_OR_HUB_ID)
    task_set = export.add_mutually_exclusive_group(required=True)
    task_set.add_argument("--tasks", metavar="SET", help=f"Export this task set: {TASK_SET}.")
    task_set.add_argument("--as-trained", metavar="TASK", help="Export the task set that TASK was trained in.")
    export.add_argument(
        "--format",
        choices=("peft", "merged"),
        required=True,
        help="Write a PEFT LoRA directory (peft), or a full model with the set merged (merged).",
    )
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="The output: a new or empty folder.")
    export.add_argument(
        "--model",
        metavar="M",
        help="The base model: a folder, a hub id or a short name (default: the one that the checkpoint names).",
    )
    export.add_argument(
        "--revision",
        metavar="REV",
        help="A branch, tag or commit of the base model on the hub (default: the checkpoint's, or M's main branch).",
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        help="The dtype of the written tensors (default: float32 for peft, the base model's own for merged).",
    )
    export.add_argument("--allow-other-base", action="store_true", help=OTHER_BASE)


def _add_import(commands: Subcommands) -> None:
    import_ = _add_command(
        commands,
        "import",
        dispatch.import_,
        "Add an adapter that was trained elsewhere to a checkpoint, as a new task.",
        "The adapter is a LoRA in PEFT's format or a task set of another LoRAF checkpoint. One that uses the "
        "checkpoint's own A is copied exactly; any other is approximated at free positions, and refused if the "
        "approximation is not close.",
    )
    import_.add_argument("folder", type=Path, metavar="DIR", help="The adapter: a PEFT directory or LoRAF checkpoint.")
    import_.add_argument("--into", type=Path, required=True, metavar="CKPT", help=CHECKPOINT_FOLDER)
    import_.add_argument("--name", required=True, metavar="TASK", help="The new task's name.")
    import_.add_argument(
        "--tasks", metavar="SET", help=f"The tasks to take from a LoRAF checkpoint, as one new task: {TASK_SET}."
    )
    import_.add_argument(
        "--sparsity",
        type=float,
        metavar="S",
        help="The new task's share of zeros in B, in [0, 1) (default: the adapter's own, or the last task's).",
    )
    import_.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="The dtype of the stored values (default: the adapter's, the last task's, or float32 to be exact).",
    )
    import_.add_argument(
        "--allow-lossy", action="store_true", help="Store the closest approximation, however far from the adapter."
    )
    import_.add_argument("--allow-other-base", action="store_true", help=OTHER_BASE)


def _add_remove(commands: Subcommands) -> None:
    remove = _add_command(
        commands,
        "remove",
        dispatch.remove,
        "Remove a task from a checkpoint and free its positions.",
        "The task's values and statistics are deleted, and named sets with it. Tasks that were trained on top of it "
        "stay, but can no longer be served as they were trained.",
    )
    remove.add_argument("checkpoint", type=Path, metavar="CKPT", help=CHECKPOINT_FOLDER)
    remove.add_argument("task", metavar="TASK", help="The task's name.")
    remove.add_argument("--dry-run", action="store_true", help="Print what would happen, and change nothing.")


def _add_protect(commands: Subcommands) -> None:
    protect = _add_file_command(
        commands,
        "protect",
        dispatch.protect,
        "Gather the statistics of finished tasks, so that later tasks keep what they answer.",
        "For tasks that were trained without retention. Needs the records that they were trained on.",
        of_checkpoint=True,
    )
    protect.add_argument("--again", action="store_true", help="Gather those of tasks that have statistics, too.")


def _add_tune_weights(commands: Subcommands) -> None:
    tune_weights = _add_file_command(
        commands,
        "tune-weights",
        dispatch.tune_weights,
        "Choose a weight for each of some tasks without training, and store them as a named set.",
        "Every evaluation set is split in two by the file's seed: one half chooses the weights, the other is held out "
        "and scored.",
        of_checkpoint=True,
    )
    tune_weights.add_argument("--tasks", required=True, metavar="A,B", help="The tasks to combine: a,b or all.")
    tune_weights.add_argument(
        "--name", required=True, metavar="SET", help="The set's name, which stands wherever a task set is named."
    )
    tune_weights.add_argument("--replace", action="store_true", help="Replace the set if there is one of that name.")
    tune_weights.add_argument("--limit", type=_positive, metavar="N", help=EVAL_LIMIT)


def _add_card(commands: Subcommands) -> None:
    card = _add_command(commands, "card", dispatch.card, "Print a model card for the hub, generated from the manifest.")
    card.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT_OR_HUB_ID)
    card.add_argument(
        "--name", metavar="NAME", help="The checkpoint's name on the card, such as org/name (default: CKPT)."
    )
    card.add_argument(
        "--write", action="store_true", help="Write the card to README.md in the checkpoint's folder instead."
    )
    card.add_argument(
        "--with-statistics", action="store_true", help="Describe the statistics too, for a push that uploads them."
    )


def _add_push(commands: Subcommands) -> None:
    push = _add_command(
        commands,
        "push",
        dispatch.push,
        "Upload a checkpoint to the hub.",
        "The checkpoint is verified first. One commit then uploads the manifest, the tasks and a model card (the "
        "folder's README.md, or one generated from the manifest). Other files in the folder are not uploaded.",
    )
    push.add_argument("checkpoint", type=Path, metavar="CKPT", help=CHECKPOINT_FOLDER)
    push.add_argument("repository", metavar="REPO", help="The repository, org/name; it is created if missing.")
    push.add_argument("--private", action="store_true", help="Create a missing repository as private.")
    push.add_argument("--revision", metavar="BRANCH", help="An existing branch to push to (default: main).")
    push.add_argument(
        "--message", metavar="TEXT", help="The commit message (default: a line that names the checkpoint's tasks)."
    )
    push.add_argument(
        "--with-statistics",
        action="store_true",
        help="Upload the tasks' statistics too, which protect them while others train more tasks (default: left out).",
    )


def _add_command(
    commands: Subcommands, name: str, command: Command, summary: str, details: str = ""
) -> argparse.ArgumentParser:
    """Adds a subcommand: `summary` is its line in the list of commands, `details` follow on its own page."""
    parser = commands.add_parser(name, help=summary, description=f"{summary} {details}".rstrip())
    parser.set_defaults(command=command)
    return parser


def _add_file_command(
    commands: Subcommands, name: str, command: Command, summary: str, details: str = "", of_checkpoint: bool = False
) -> argparse.ArgumentParser:
    """Adds a subcommand that reads a tasks.yaml; with `of_checkpoint`, the folder of a checkpoint comes before it."""
    parser = _add_command(commands, name, command, summary, details)
    if of_checkpoint:
        parser.add_argument("checkpoint", type=Path, metavar="CKPT", help=CHECKPOINT_FOLDER)
    parser.add_argument("file", type=Path, metavar="tasks.yaml", help="The file that names model, tasks and output.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Override a value of the file, such as training.epochs=1 or tasks.math.alpha=32 (a value that a task sets "
        "itself takes precedence); repeatable.",
    )
    return parser


def _positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError("must be a whole number of 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
