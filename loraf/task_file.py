"""Tasks' files: read once, hashed and parsed from the same bytes, never a memory map of a file that may change.

A file is in safetensors' format: eight bytes with the length of a JSON header, the header, the tensors' bytes. It is
parsed here because safetensors copies every tensor while nothing else may run, and takes a header that holds a key
twice; whatever is accepted here, safetensors reads alike.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraf import strict_json
from loraf.errors import Problem
from loraf.manifest import Manifest, Task
from loraf.pages import pages
from loraf.sparse import SparseB, examine
from loraf.threads import in_threads

RESTORE = "restore the checkpoint from a copy, or train it again"
PARTS = ("rows", "cols", "values")
BYTES_AT_ONCE = 1 << 22  # read, then hashed while they are in the cache
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_MOST_DIMENSIONS = 64
_HEADER_UNIT = 8  # bytes; the tensors begin at a multiple of it
_FIELDS = {"dtype", "shape", "data_offsets"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Refused(Exception):
    """What is wrong with a file."""


def encode(masks: Mapping[str, SparseB]) -> bytes:
    """The content of a task's file: module after module, so that a reader needs only some of it at a time.

    Every tensor begins at a multiple of its numbers' size, as safetensors' readers ask for: one that would bring the
    next ones out of step waits, until those that wait come out even.

    Args:
        masks: module → SparseB.
    """
    tensors = {f"{module}.{part}": getattr(b, part).contiguous() for module, b in masks.items() for part in PARTS}
    unit = max((tensor.itemsize for tensor in tensors.values()), default=1)
    order: list[str] = []
    waiting: list[str] = []
    for name, tensor in tensors.items():
        (waiting if tensor.nbytes % unit else order).append(name)
        if sum(tensors[other].nbytes for other in waiting) % unit == 0:
            order += sorted(waiting, key=lambda name: -tensors[name].itemsize)
            waiting = []
    order += sorted(waiting, key=lambda name: -tensors[name].itemsize)
    entries, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    header = strict_json.dumps(entries)
    header += b" " * (-len(header) % _HEADER_UNIT)
    return b"".join([len(header).to_bytes(8, "little"), header, *(bytes_of(tensors[name]) for name in order)])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def read_all(path: Path, manifest: Manifest) -> tuple[dict[str, dict[str, SparseB]], list[Problem]]:
    """The files of all tasks of `manifest`, read and verified, several at a time.

    Args:
        path: the checkpoint's folder.

    Returns:
        Task → module → SparseB, and everything that is wrong; only without problems are all tasks there.
    """
    read = dict(zip(manifest.task_names, in_threads(lambda t: _read(path, manifest, t), manifest.tasks), strict=True))
    tasks = {name: found for name, found in read.items() if not isinstance(found, Problem)}
    unreadable = [found for found in read.values() if isinstance(found, Problem)]
    wrong = verify(path, manifest, tasks, RESTORE)
    if unreadable:  # in the order of the tasks
        files = [str(path / task.file.path) for task in manifest.tasks]
        wrong = sorted([*unreadable, *wrong], key=lambda problem: files.index(problem.file))
    return tasks, wrong


def verify(path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], remedy: str) -> list[Problem]:
    """Everything that is wrong with the masks and values of `tasks`; overlaps only if nothing else is.

    Args:
        manifest: with all of `tasks`.
        tasks: task → module → SparseB.
    """
    for name, masks in tasks.items():
        known = manifest.task(name)
        if set(masks) != set(known.k):
            odd = ", ".join(sorted(set(masks) ^ set(known.k))[:4])
            message, remedy = f"modules differ from the checkpoint's ({odd})", "give every target module"
            return [Problem(message, file=str(path / known.file.path), remedy=remedy)]
    found = in_threads(lambda module: examine_module(manifest, tasks, module), manifest.modules)
    by_module = dict(zip(manifest.modules, found, strict=True))
    problems = [
        Problem(by_module[module][0][name], module, str(path / manifest.task(name).file.path), remedy)
        for name, masks in tasks.items()
        for module in masks
        if name in by_module[module][0]
    ]
    if not problems:
        for module, (_, shared) in by_module.items():
            problems += _overlaps(path, manifest, tasks, module, remedy) if shared else []
    return problems


def examine_module(
    manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], module: str
) -> tuple[dict[str, str], bool]:
    """Task → what is wrong with it in one module; and whether two tasks share a position there, if nothing is wrong."""
    shape = (manifest.modules[module].d_out, manifest.rank)
    masks = {name: of_task[module] for name, of_task in tasks.items()}
    faults = {name: "the matrix has another shape" for name, b in masks.items() if b.shape != shape}
    masks = {name: b for name, b in masks.items() if name not in faults}
    wrong, shared = examine(list(masks.values()))
    for (name, b), fault in zip(masks.items(), wrong, strict=True):
        task = manifest.task(name)
        if fault is None and len(b.values) != task.k[module]:
            fault = f"has {len(b.values)} positions, K is {task.k[module]}"
        if fault is None and b.values.dtype != getattr(torch, task.dtype):
            fault = f"values are {b.values.dtype}, the manifest says {task.dtype}"
        if fault:
            faults[name] = fault
    return faults, shared and not faults


def _overlaps(
    path: Path, manifest: Manifest, tasks: Mapping[str, Mapping[str, SparseB]], module: str, remedy: str
) -> list[Problem]:
    """How many positions of one module each two tasks both own."""
    problems = []
    names = list(tasks)
    owner = np.zeros(manifest.modules[module].d_out * manifest.rank, dtype=np.int32)  # 0: free; else task, from 1
    for number, name in enumerate(names, 1):
        flat = tasks[name][module].flat.numpy()
        held = owner[flat]
        for other, count in zip(*np.unique(held[held > 0], return_counts=True), strict=True):
            message = f"task {name!r} holds {count} positions of task {names[other - 1]!r}"
            problems.append(Problem(message, module, str(path / manifest.task(name).file.path), remedy))
        owner[flat] = number
    return problems


def _read(path: Path, manifest: Manifest, task: Task) -> dict[str, SparseB] | Problem:
    """One task's tensors, not yet verified, or why there are none."""
    file = path / task.file.path
    try:
        tensors = parse(_content(file, task))
        expected = tensor_names(task)
        if set(tensors) != expected:
            odd = ", ".join(sorted(set(tensors) ^ expected)[:4])
            raise _Refused(f"holds other tensors than the manifest names ({odd})")
    except OSError as error:
        return Problem(f"cannot be read ({error.strerror})", file=str(file), remedy=RESTORE)
    except ValueError as error:
        return Problem(f"is no safetensors file ({error})", file=str(file), remedy=RESTORE)
    except _Refused as error:
        return Problem(str(error), file=str(file), remedy=RESTORE)
    return {
        module: SparseB(
            *(tensors[f"{module}.{part}"] for part in PARTS), (manifest.modules[module].d_out, manifest.rank)
        )
        for module in task.k
    }


def tensor_names(task: Task) -> set[str]:
    """What a task's file holds."""
    return {f"{module}.{part}" for module in task.k for part in PARTS}


def _content(file: Path, task: Task) -> memoryview:
    """The file's bytes, which have the stated digest, writable.

    Raises:
        OSError: it cannot be read.
        _Refused: it is another file.
    """
    stated = task.file
    sha = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        view = memoryview(pages(size if size == stated.bytes else 0).numpy())
        at = 0
        while at < len(view) and (count := stream.readinto(view[at : at + BYTES_AT_ONCE])):
            sha.update(view[at : at + count])
            at += count
        if at < len(view) or (len(view) and stream.read(1)):  # it changes while it is read
            size = os.fstat(stream.fileno()).st_size
    if size != stated.bytes:
        raise _Refused(f"is not the file that the manifest names ({size} bytes, {stated.bytes} expected)")
    if at < size or sha.hexdigest() != stated.sha256:
        raise _Refused("is not the file that the manifest names (its SHA-256 differs)")
    return view


def parse(data: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. They share the memory of `data` (writable) where it is aligned for them.

    Raises:
        ValueError: it is none.
    """
    start = header_end(data[:8], len(data))
    return {
        e.name: tensor(data, start + e.first, start + e.last, e.dtype, e.shape)
        for e in parse_header(data[8:start], len(data) - start)
    }


def header_end(beginning: bytes | memoryview, size: int) -> int:
    """Where the tensors of a file of `size` bytes begin; `beginning`: its first eight bytes. Raises ValueError."""
    if len(beginning) < 8:
        raise ValueError("it is shorter than a header's length")
    length = int.from_bytes(beginning, "little")
    if length > _LONGEST_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length} bytes does not fit")
    return 8 + length


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `first`, `last`: its first byte, and one past the last, from where the tensors begin."""

    name: str
    first: int
    last: int
    dtype: torch.dtype
    shape: list[int]


def parse_header(text: bytes | memoryview, size: int) -> list[Entry]:
    """The tensors that a header names, in the order in which they lie in the file.

    Args:
        size: bytes that follow the header.

    Raises:
        ValueError: it is none. It must be strict JSON, every entry well-formed, and the tensors must fill those bytes
            exactly, without a hole or an overlap.
    """
    header = strict_json.loads(bytes(text))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("__metadata__ does not map names to text")
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda e: (e.first, e.last))
    end = 0
    for entry in entries:
        if entry.first != end:
            raise ValueError(f"the bytes of {entry.name!r} do not follow on those before")
        end = entry.last
    if end != size:
        raise ValueError(f"the tensors take {end} bytes of {size}")
    return entries


def _entry(name: str, entry: Any) -> Entry:
    """Raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"{name!r} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{name!r} has a shape or offsets that are no lists")
    numbers = [*shape, *offsets]
    if {*map(type, numbers)} != {int} or not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"{name!r} has a shape or offsets that are no sizes")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name!r} has {len(shape)} dimensions")
    size = _DTYPES[dtype].itemsize * math.prod(shape)
    if size != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r} takes {size} bytes, its offsets say {offsets[1] - offsets[0]}")
    return Entry(name, *offsets, _DTYPES[dtype], shape)


def tensor(data: memoryview, first: int, last: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Of the bytes from `first` to `last`, which it shares where they are aligned for it."""
    if first == last:  # torch.frombuffer takes no empty one
        return torch.empty(shape, dtype=dtype)
    if first % dtype.itemsize:  # numbers must lie at multiples of their size
        data, first, last = bytearray(data[first:last]), 0, last - first
    flat = torch.frombuffer(data, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first)
    return flat if len(shape) == 1 else flat.view(shape)
