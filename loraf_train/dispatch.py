"""What each command of `loraf-train` calls with its options. A command's modules are imported only when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(options: argparse.Namespace) -> int:
    from loraf_train.commands.run import run

    return run(options.file, options.set, not options.no_eval, options.eval_limit)


def check(options: argparse.Namespace) -> int:
    from loraf_train.commands.check import check

    return check(options.file, options.set)


def eval_(options: argparse.Namespace) -> int:
    from loraf_train.commands.eval import evaluate

    return evaluate(
        options.file, options.set, options.tasks, options.as_trained, options.base, options.limit, options.json
    )


def compare(options: argparse.Namespace) -> int:
    from loraf_train.commands.compare import compare

    return compare(
        options.file,
        options.set,
        options.methods,
        options.protocol,
        options.seeds,
        options.out,
        options.eval_limit,
        options.stored,
    )


def inspect(options: argparse.Namespace) -> int:
    from loraf_train.commands.inspect import inspect

    return inspect(
        _local_folder(options.checkpoint, statistics=options.verify), options.verify, options.json, options.layers
    )


def export(options: argparse.Namespace) -> int:
    from loraf_train.commands.export import export

    return export(
        _local_folder(options.checkpoint),
        options.out,
        options.format,
        options.tasks,
        options.as_trained,
        options.model,
        options.dtype,
        options.allow_other_base,
        options.revision,
    )


def import_(options: argparse.Namespace) -> int:
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


def remove(options: argparse.Namespace) -> int:
    from loraf_train.commands.remove import remove

    return remove(options.checkpoint, options.task, options.dry_run)


def protect(options: argparse.Namespace) -> int:
    from loraf_train.commands.protect import protect

    return protect(options.checkpoint, options.file, options.set, options.again)


def tune_weights(options: argparse.Namespace) -> int:
    from loraf_train.commands.tune_weights import tune_weights

    return tune_weights(
        options.checkpoint, options.file, options.set, options.tasks, options.name, options.replace, options.limit
    )


def card(options: argparse.Namespace) -> int:
    from loraf_train.commands.push import card

    return card(options.checkpoint, options.write, options.name, options.with_statistics)


def push(options: argparse.Namespace) -> int:
    from loraf_train.commands.push import push

    return push(
        options.checkpoint,
        options.repository,
        options.private,
        options.revision,
        options.message,
        options.with_statistics,
    )


def _local_folder(checkpoint: str, statistics: bool = False) -> Path:
    """A checkpoint's folder; one on the hub is downloaded first, on request with its statistics."""
    from loraf.hub import checkpoint_folder

    return checkpoint_folder(checkpoint, statistics=statistics)
