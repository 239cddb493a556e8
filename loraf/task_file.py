"""Task files: read once, hashed and parsed from the same bytes, never memory-mapped, since a file may change.

A task's file is in the safetensors format and holds three tensors for each module, named `<module>.rows`,
`<module>.cols` and `<module>.values`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from loraf import limits
from loraf.errors import Problem
from loraf.files import strict_safetensors
from loraf.files.bounded_file import open_regular
from loraf.files.strict_json import shown_name
from loraf.manifest import Manifest, Task
from loraf.matrices.sparse import SparseB, examine
from loraf.system import in_threads, pages

RESTORE = "restore the checkpoint from a copy, or train it again"
PARTS = ("rows", "cols", "values")
BYTES_AT_ONCE = 1 << 22  # read, then hashed while they are in the cache


class _Refused(Exception):
    """What is wrong with a file."""


def encode(matrices: Mapping[str, SparseB]) -> bytes:
    """Encodes a task's file, module after module, so that a reader can stream it.

    Every tensor begins at a multiple of its item size, as safetensors' readers require. A tensor that would misalign
    the next one is held back until the tensors held back together restore the alignment.

    Args:
        matrices: module → SparseB.
    """
    tensors = {f"{module}.{part}": getattr(b, part).contiguous() for module, b in matrices.items() for part in PARTS}
    unit = max((tensor.itemsize for tensor in tensors.values()), default=1)
    order: list[str] = []
    waiting: list[str] = []
    for name, tensor in tensors.items():
        (waiting if tensor.nbytes % unit else order).append(name)
        if sum(tensors[other].nbytes for other in waiting) % unit == 0:
            order += sorted(waiting, key=lambda name: -tensors[name].itemsize)
            waiting = []
    order += sorted(waiting, key=lambda name: -tensors[name].itemsize)
    return strict_safetensors.encode((name, tensors[name]) for name in order)


def tensor_names(task: Task) -> set[str]:
    """Returns the names of the tensors in a task's file."""
    return {f"{module}.{part}" for module in task.k for part in PARTS}


def longest_header(task: Task) -> int:
    """Returns the most bytes that the header of a task's file may take."""
    return limits.header_bytes(len(PARTS) * len(task.k), max(map(len, task.k), default=0) + len(".values"))


def matrix_of(tensors: Mapping[str, torch.Tensor], module: str, shape: tuple[int, int]) -> SparseB:
    """Returns one module's SparseB from the tensors of a task's file, unverified.

    Args:
        shape: (d_out, rank).
    """
    rows, cols, values = (tensors[f"{module}.{part}"] for part in PARTS)
    return SparseB(rows, cols, values, shape)


def read_all(path: Path, manifest: Manifest) -> tuple[dict[str, dict[str, SparseB]], list[Problem]]:
    """Reads and verifies the files of all tasks of `manifest`, several at a time.

    Args:
        path: the checkpoint's folder.

    Returns:
        Task → module → SparseB, and all problems. A task whose file could not be read is missing.
    """
    read = dict(zip(manifest.task_names, in_threads(lambda t: _read(path, manifest, t), manifest.tasks), strict=True))
    tasks = {name: matrices for name, matrices in read.items() if not isinstance(matrices, Problem)}
    unreadable = [problem for problem in read.values() if isinstance(problem, Problem)]
    problems = verify(path, manifest, tasks, RESTORE)
    if unreadable:  # in the order of the tasks
        files = [str(path / task.file.path) for task in manifest.tasks]
        problems = sorted([*unreadable, *problems], key=lambda problem: files.index(problem.file))
    return tasks, problems


def verify(path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], remedy: str) -> list[Problem]:
    """Returns all problems with the positions and values of `tasks`. Overlaps are reported only if nothing else is.

    Args:
        path: the checkpoint's folder.
        manifest: has all of `tasks`.
        tasks: task → module → SparseB.
        remedy: of every problem.
    """
    for name, of_task in tasks.items():
        task = manifest.task(name)
        if set(of_task) != set(task.k):
            differing = ", ".join(sorted(set(of_task) ^ set(task.k))[:4])
            message = f"modules differ from the checkpoint's ({differing})"
            return [Problem(message, file=str(path / task.file.path), remedy="give values for every target module")]
    examined = in_threads(lambda module: examine_module(manifest, tasks, module), manifest.modules)
    by_module = dict(zip(manifest.modules, examined, strict=True))
    problems = [
        Problem(by_module[module][0][name], module, str(path / manifest.task(name).file.path), remedy)
        for name, of_task in tasks.items()
        for module in of_task
        if name in by_module[module][0]
    ]
    if not problems:
        for module, (_, shared) in by_module.items():
            problems += _overlaps(path, manifest, tasks, module, remedy) if shared else []
    return problems


def examine_module(
    manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], module: str
) -> tuple[dict[str, str], bool]:
    """Checks the tasks' SparseB of one module.

    Returns:
        Task → what is wrong with it; and whether two tasks share a position, False if anything is wrong.
    """
    shape = (manifest.modules[module].d_out, manifest.rank)
    matrices = {name: of_task[module] for name, of_task in tasks.items()}
    faults = {name: "the matrix has another shape" for name, b in matrices.items() if b.shape != shape}
    matrices = {name: b for name, b in matrices.items() if name not in faults}
    matrix_faults, shared = examine(list(matrices.values()))
    for (name, b), fault in zip(matrices.items(), matrix_faults, strict=True):
        task = manifest.task(name)
        if fault is None and len(b.values) != task.k[module]:
            fault = f"has {len(b.values)} positions, but K is {task.k[module]}"
        if fault is None and b.values.dtype != getattr(torch, task.dtype):
            fault = f"values are {b.values.dtype}, but the manifest says {task.dtype}"
        if fault:
            faults[name] = fault
    return faults, shared and not faults


def _overlaps(
    path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], module: str, remedy: str
) -> list[Problem]:
    """Reports for every two tasks how many positions of one module both own."""
    problems = []
    names = list(tasks)
    positions = np.concatenate([tasks[name][module].positions.numpy() for name in names])
    owners = np.repeat(np.arange(len(names)), [len(tasks[name][module].values) for name in names])
    order = np.argsort(positions, kind="stable")  # of one position, the tasks stay in their order
    positions, owners = positions[order], owners[order]
    shared = np.flatnonzero(positions[1:] == positions[:-1])
    pairs, counts = np.unique(np.stack([owners[shared + 1], owners[shared]]), axis=1, return_counts=True)
    for (number, other), count in zip(pairs.T, counts, strict=True):
        name = names[number]
        message = f"task {name!r} holds {count} positions of task {names[other]!r}"
        problems.append(Problem(message, module, str(path / manifest.task(name).file.path), remedy))
    return problems


def _read(path: Path, manifest: Manifest, task: Task) -> dict[str, SparseB] | Problem:
    """Returns one task's SparseB of each module, not yet verified, or the reason why the file cannot be used."""
    file = path / task.file.path
    try:
        tensors = strict_safetensors.parse(_content(file, task), longest_header(task))
        expected = tensor_names(task)
        if set(tensors) != expected:
            differing = ", ".join(map(shown_name, sorted(set(tensors) ^ expected)[:4]))
            raise _Refused(f"holds other tensors than the manifest lists ({differing})")
    except OSError as error:
        return Problem(f"cannot be read ({error.strerror})", file=str(file), remedy=RESTORE)
    except ValueError as error:
        return Problem(f"is not a safetensors file ({error})", file=str(file), remedy=RESTORE)
    except _Refused as error:
        return Problem(str(error), file=str(file), remedy=RESTORE)
    return {module: matrix_of(tensors, module, (manifest.modules[module].d_out, manifest.rank)) for module in task.k}


def _content(file: Path, task: Task) -> memoryview:
    """Returns the bytes of a file, writable, after checking their digest.

    Raises:
        OSError: cannot be read.
        _Refused: not the file that the manifest lists.
    """
    stated = task.file
    sha = hashlib.sha256()
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        view = strict_safetensors.bytes_of(pages(size if size == stated.bytes else 0))
        at = 0
        while at < len(view) and (count := stream.readinto(view[at : at + BYTES_AT_ONCE])):
            sha.update(view[at : at + count])
            at += count
        if at < len(view) or (len(view) and stream.read(1)):  # the file changes while it is read
            size = os.fstat(stream.fileno()).st_size
    if size != stated.bytes:
        raise _Refused(f"is not the file that the manifest lists ({size} bytes, {stated.bytes} expected)")
    if at < size or sha.hexdigest() != stated.sha256:
        raise _Refused("is not the file that the manifest lists (its SHA-256 differs)")
    return view
