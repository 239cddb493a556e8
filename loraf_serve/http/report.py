"""What a page shows of a checkpoint beside its answers: what was forgotten, and where each task's positions lie.

    {"adapter", "digest", "rank",
     "tasks":   [{"name", "alpha", "sparsity", "parameters", "trained_with"}],
     "scores":  [{"task", "evaluation", "metric", "count", "as_trained", "all", "others": [{"set", "score"}]}],
     "masks":   {"bins", "modules": [{"name", "positions", "free", "owned", "rows"}]}}

Where the masks cannot be read any more, `masks` is null and `masks_missing` says why.

`as_trained` is the score under the set that was active when the task had just been trained, `all` the one under all
tasks of the adapter; null where it was not measured. `owned` has the number of positions of each task in a module, in
the order of `tasks`; `rows` for each task `bins` numbers: how many of its positions lie in each part of the rows of B,
which are the module's output features, in thousandths of what the part holds.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loraf.checkpoint_stream import CheckpointStream
from loraf.errors import LorafError, UnknownTask
from loraf.manifest import Manifest, Task
from loraf.matrices.sparse import SparseB
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import ServedAdapter

BINS = 16  # parts of a module's rows; a page has room for no more
_AT_ONCE = 8  # modules that are read together
_KEPT = 4  # checkpoints whose masks are remembered
_CHANGED = "the checkpoint's folder has been changed since it was loaded"
_reading = threading.Lock()  # one checkpoint is read at a time, and none of them twice

# Module → task → (positions, BINS shares in thousandths).
Masks = dict[str, dict[str, tuple[int, list[int]]]]


def report_of(adapter: ServedAdapter, allowed: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the report of an adapter, as plain JSON.

    Reads the checkpoint's files at the first call, which takes seconds for a large one: call it in a thread.

    Args:
        allowed: the tasks that may be told of; None for all.
    """
    manifest = adapter.manifest
    tasks = [task for task in manifest.tasks if allowed is None or task.name in allowed]
    report: dict[str, Any] = {
        "adapter": adapter.name,
        "digest": adapter.digest,
        "rank": manifest.rank,
        "tasks": [_task(task, allowed) for task in tasks],
        "scores": [row for task in tasks for row in _scores(task, manifest, allowed)],
        "masks": None,
    }
    try:
        masks = _masks(adapter)
    except LorafError:  # its text names the folder, which is nobody's business outside
        return report | {"masks_missing": _CHANGED}
    return report | {"masks": {"bins": BINS, "modules": _modules(masks, manifest, [task.name for task in tasks])}}


def _task(task: Task, allowed: Collection[str] | None) -> dict[str, Any]:
    return {
        "name": task.name,
        "alpha": task.alpha,
        "sparsity": task.sparsity,
        "parameters": task.parameters,
        "trained_with": [name for name in task.trained_with if allowed is None or name in allowed],
    }


def _scores(task: Task, manifest: Manifest, allowed: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """One row for each evaluation of a task."""
    as_trained = _as_trained(task.name, manifest)
    by_evaluation: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for entry in task.scores:
        if allowed is None or set(_names(entry["set"])) <= set(allowed):
            by_evaluation.setdefault((entry["evaluation"], entry["metric"]), {})[entry["set"]] = entry
    for (evaluation, metric), by_set in by_evaluation.items():
        special = {"as_trained": as_trained, "all": str(manifest.all_tasks())}
        yield {
            "task": task.name,
            "evaluation": evaluation,
            "metric": metric,
            "count": next(iter(by_set.values()))["count"],
            **{name: by_set[text]["score"] if text in by_set else None for name, text in special.items()},
            "others": [
                {"set": text, "score": entry["score"]} for text, entry in by_set.items() if text not in special.values()
            ],
        }


def _as_trained(name: str, manifest: Manifest) -> str | None:
    try:
        return str(manifest.as_trained(name))
    except UnknownTask:  # a task that it was trained with has not been loaded
        return None


def _names(text: str) -> list[str]:
    """The tasks in the canonical text of a set."""
    return [part.partition(":")[0] for part in text.split("+")] if text != str(TaskSet()) else []


def _modules(masks: Masks, manifest: Manifest, tasks: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "positions": manifest.modules[name].d_out * manifest.rank,
            "free": manifest.free_positions(name),
            "owned": [of_task[task][0] for task in tasks],
            "rows": [of_task[task][1] for task in tasks],
        }
        for name, of_task in masks.items()
    ]


def _masks(adapter: ServedAdapter) -> Masks:
    """The masks, from memory where this process has them. Raises LorafError if the folder has been changed."""
    with _reading:
        if adapter.checkpoint is not None:
            tasks = adapter.checkpoint.tasks
            return {
                module: {task: _binned(of_task[module]) for task, of_task in tasks.items()}
                for module in adapter.manifest.modules
            }
        return _read_masks(adapter.path, adapter.tasks, adapter.digest)


@lru_cache(_KEPT)
def _read_masks(path: Path, tasks: tuple[str, ...], digest: str) -> Masks:
    masks: Masks = {}
    with CheckpointStream.open(path, tasks) as stream:
        if stream.manifest.adapter_digest != digest:
            raise LorafError(_CHANGED)
        names = list(stream.manifest.modules)
        for start in range(0, len(names), _AT_ONCE):
            modules = names[start : start + _AT_ONCE]
            with stream.read_modules(modules) as read:
                masks |= {m: {task: _binned(of_task[m]) for task, of_task in read.items()} for m in modules}
        stream.finish()
    return masks


def _binned(b: SparseB) -> tuple[int, list[int]]:
    """The number of positions, and for each part of the rows the share that they take of it, in thousandths."""
    d_out, rank = b.shape
    edges = np.linspace(0, d_out, BINS + 1).round().astype(np.int64)
    counts = np.diff(np.searchsorted(b.rows.numpy(), edges))  # rows are sorted
    sizes = np.maximum(np.diff(edges) * rank, 1)
    return len(b.values), (1000 * counts / sizes).round().astype(int).tolist()
