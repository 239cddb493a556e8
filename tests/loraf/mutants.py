"""Turns any bytes into a changed checkpoint: every decision is read from them. So a fuzzer can search the decisions, a
random number generator can draw them, and a few bytes are all that is needed to make a mutant again.

Most changes are followed by `seal`, which recomputes sizes and digests as the author of a hostile checkpoint would, so
that the checks behind the digests are reached. `tests/loraf/hostile_changes.py` has the values.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraf import manifest as manifests
from loraf.matrices import projection
from tests.loraf.hostile_changes import NUMBERS, TEXTS, Choices, a_value, change, header_change, text_change
from tests.loraf.mutated_tensors import OTHER_NAMES, TENSOR_CHANGES, WHOLE_FILE, Tensor, encoded, tensors_of
from tests.loraf.small_manifests import sha256_of

MANIFEST = manifests.FILE_NAME


class Base:
    """A checkpoint to change.

    Attributes:
        files: path → content, without the manifest.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = (folder / MANIFEST).read_bytes()
        paths = [file for file in sorted(folder.rglob("*.safetensors")) if file.is_file()]
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        self.tensors = {path: tensors_of(data) for path, data in self.files.items()}
        self.task_files = [path for path in self.files if path.startswith("tasks/")]


@dataclass
class Mutant:
    """A changed checkpoint.

    Attributes:
        content: of the manifest, to be sealed.
        text: of the manifest as it is, in place of `content`.
        entries: path → content; a tuple is no file, see `special`. `loraf.json` only if it is none.
        changed: paths whose content was changed, the manifest left out.
        sealed: whether sizes and digests are recomputed.
        kinds: names of the changes.
    """

    base: Base
    content: dict[str, Any]
    entries: dict[str, bytes | tuple[str, ...]]
    text: bytes | None = None
    changed: set[str] = field(default_factory=set)
    sealed: bool = True
    kinds: list[str] = field(default_factory=list)

    def put(self, path: str, data: bytes) -> None:
        self.entries[path] = data
        self.changed.add(path)

    def file(self, chance: Choices) -> tuple[str, bytes] | None:
        """One of the files that are still files."""
        paths = [path for path, entry in self.entries.items() if isinstance(entry, bytes)]
        path = chance.choice(paths) if paths else None
        return None if path is None else (path, self.entries[path])


def mutant(data: bytes, bases: Sequence[Base]) -> Mutant:
    """Returns the mutant that these bytes describe."""
    chance = Choices(data)
    base = chance.choice(bases)
    made = Mutant(base, json.loads(base.manifest), dict(base.files))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind = chance.choice(KINDS)
        made.kinds.append(kind.__name__)
        kind(chance, made)
    if made.text is None:
        seal = chance.choice((_seal_all,) * 12 + (_seal_files, _seal_manifest, _seal_nothing))
        made.text = seal(made)
    return made


# --- digests ------------------------------------------------------------------------------------------------------


def _seal_all(made: Mutant) -> bytes:
    _state_files(made)
    return _signed(made.content)


def _seal_files(made: Mutant) -> bytes:
    """The manifest keeps its own digests, which no longer fit."""
    if made.changed:
        _state_files(made)
    made.sealed = False
    return json.dumps(made.content).encode()


def _seal_manifest(made: Mutant) -> bytes:
    """The manifest keeps the sizes and digests of the files as they were."""
    made.sealed = False
    return _signed(made.content)


def _seal_nothing(made: Mutant) -> bytes:
    made.sealed = False
    return json.dumps(made.content).encode()


def _state_files(made: Mutant) -> None:
    """States the sizes and digests of all changed files, where the manifest is well-formed enough."""
    tasks = made.content.get("tasks") if isinstance(made.content, dict) else None
    for task in tasks if isinstance(tasks, list) else ():
        for stored in (task.get("file"), task.get("statistics")) if isinstance(task, dict) else ():
            path = stored.get("path") if isinstance(stored, dict) else None
            entry = made.entries.get(path) if isinstance(path, str) else None
            if isinstance(entry, bytes) and path in made.changed:
                stored |= {"bytes": len(entry), "sha256": hashlib.sha256(entry).hexdigest()}


def _signed(content: Any) -> bytes:
    """The manifest with valid digests, or as it is where it is too malformed to have any."""
    if not isinstance(content, dict):
        return json.dumps(content).encode()
    content = {key: value for key, value in content.items() if key != "digest"}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):  # no digest fits it
        std = content["projection"].get("init_std")
        covered = {
            "rank": content["rank"],
            "projection": content["projection"] | {"init_std": None if std is None else float(std)},
            "modules": {name: [entry["d_out"], entry["d_in"]] for name, entry in content["modules"].items()},
            "tasks": [[t["name"], float(t["alpha"]), t["file"]["sha256"]] for t in content.get("tasks", [])],
        }
        content["adapter_digest"] = sha256_of(covered)
    try:
        return json.dumps(content | {"digest": sha256_of(content)}).encode()
    except UnicodeEncodeError:
        return json.dumps(content).encode()


# --- bytes --------------------------------------------------------------------------------------------------------


def _bytes_change(chance: Choices, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.number(max(1, len(changed)))
        piece = chance.choice([b"", b"\0", b"\xff", b"\x80\x7f", chance.take(4), bytes(300)])
        kind = chance.number(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << chance.number(8)
        elif kind == 1:
            changed[at : at + len(piece)] = piece
        elif kind == 2:
            changed[at:at] = piece
        elif kind == 3:
            del changed[at : at + chance.number(40)]
        elif kind == 4:
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + chance.number(200)]
    return bytes(changed)


def bytes_of_a_file(chance: Choices, made: Mutant) -> None:
    chosen = made.file(chance)
    if chosen:
        made.put(chosen[0], _bytes_change(chance, chosen[1]))


def bytes_of_the_manifest(chance: Choices, made: Mutant) -> None:
    made.text = _bytes_change(chance, made.base.manifest)
    made.sealed = False


def text_of_the_manifest(chance: Choices, made: Mutant) -> None:
    made.text = text_change(chance, made.base.manifest)
    made.sealed = False


def header_of_a_file(chance: Choices, made: Mutant) -> None:
    chosen = made.file(chance)
    if chosen and len(chosen[1]) >= 8 and chosen[1] is made.base.files[chosen[0]]:
        made.put(chosen[0], header_change(chance, chosen[1]))


# --- values of the manifest ------------------------------------------------------------------------------------------


def values_of_the_manifest(chance: Choices, made: Mutant) -> None:
    for _ in range(chance.randint(1, 3)):
        change(chance, made.content)


def a_value_of_a_task(chance: Choices, made: Mutant) -> None:
    """Changes one field of a task, or of its file."""
    tasks = made.content.get("tasks")
    if isinstance(tasks, list) and tasks and isinstance(task := chance.choice(tasks), dict):
        place = chance.choice([task, *(part for part in task.values() if isinstance(part, dict) and part)])
        key = chance.choice(sorted(place)) if place else "name"
        place[key] = a_value(chance)


def numbers_that_fit(chance: Choices, made: Mutant) -> None:
    """Changes what a checkpoint may state in its own way: alpha, weights of sets, scores, sparsity with its K."""
    tasks = made.content.get("tasks")
    if not isinstance(tasks, list) or not tasks or not isinstance(task := chance.choice(tasks), dict):
        return
    number = chance.choice([0.5, -3, 16, 1e-30, 1e20, *NUMBERS])
    kind = chance.number(4)
    if kind == 0:
        task["alpha"] = number
    elif kind == 1:
        made.content["sets"] = {chance.choice(["careful", "math", *TEXTS]): {str(task.get("name")): number}}
        made.content["format_version"] = chance.choice([2, 2, 2, 1])
    elif kind == 2:
        task["scores"] = [{"set": "math", "evaluation": "e", "metric": "m", "score": number, "count": 1}]
    else:
        tasks.append(tasks.pop(0))  # another order


def another_a(chance: Choices, made: Mutant) -> None:
    """Changes what A is made from: seed, standard deviation, rank, shapes, names. In most cases with its digests."""
    # An earlier change may have left nothing that could be changed in this way.
    with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError, OverflowError):
        _change_a(chance, made)


def _change_a(chance: Choices, made: Mutant) -> None:
    content = made.content
    modules, stated = content["modules"], content["projection"]
    name = chance.choice(sorted(modules))
    kind = chance.number(5)
    if kind == 0:
        stated["seed"] = chance.choice([1, -1, 2**63, 2**64 + 1, 2**127 - 1])
    elif kind == 1:
        stated["init_std"] = chance.choice([0.5, 1, 1e-20, 1e20, 1e-45, 1e38, 0, -1])
    elif kind == 2:
        modules[name]["d_in"] = chance.choice([1, 7, 17, 1000, 2**20, 2**24])
    elif kind == 3:
        new = chance.choice(["model.layers.0.x_proj", "lm_head", *OTHER_NAMES])
        content["modules"] = {new if old == name else old: spec for old, spec in modules.items()}
        for task in content["tasks"]:
            task["k"] = {new if old == name else old: k for old, k in task["k"].items()}
            _rename_in_file(made, task["file"]["path"], name, new)
    else:
        huge_a(made, chance.choice([1, 16, 2**12, 2**16, 2**24]), chance.choice([1, 4, 4096]))
    if chance.number(4):
        state_digests_of_a(content)


def _rename_in_file(made: Mutant, path: str, old: str, new: str) -> None:
    tensors = copy.deepcopy(made.base.tensors[path])
    for tensor in tensors:
        if tensor.name.startswith(f"{old}."):
            tensor.name = new + tensor.name[len(old) :]
    made.put(path, encoded(tensors))


def huge_a(made: Mutant, d_in: int, rank: int) -> None:
    """States one module that a model need not have, with an A as large as the manifest likes, and files that fit it."""
    content = made.content
    content["rank"] = rank
    content["modules"] = {"some.layer": {"d_out": 1, "d_in": d_in, "projection_sha256": "0" * 64}}
    content["tasks"] = content["tasks"][:1]
    content.pop("sets", None)
    for task in content["tasks"]:
        task["sparsity"], task["k"] = 0.9999, {"some.layer": 0}
        dtype = {"bfloat16": "BF16", "float16": "F16"}.get(task["dtype"], "F32")
        index = "U16" if rank > 256 else "U8"
        parts = (("rows", "U8"), ("cols", index), ("values", dtype))
        tensors = [Tensor(f"some.layer.{part}", of_part, [0], bytearray()) for part, of_part in parts]
        made.put(task["file"]["path"], encoded(tensors))


def state_digests_of_a(content: dict[str, Any]) -> None:
    stated, rank = content["projection"], content["rank"]
    digests = {}
    for name, spec in content["modules"].items():
        if type(rank) is int and 0 < rank * spec["d_in"] <= 1 << 16:
            std = stated.get("init_std")
            spec["projection_sha256"] = projection.digest_of(
                stated["seed"], name, rank, spec["d_in"], None if std is None else float(std)
            )
        digests[name] = spec["projection_sha256"]
    stated["sha256"] = projection.combined_digest(digests)


# --- tensors of a task's file ----------------------------------------------------------------------------------------


def tensors_of_a_task(chance: Choices, made: Mutant) -> None:
    """Changes the tensors of one module in a task's file."""
    path = chance.choice(made.base.task_files)
    tensors = copy.deepcopy(made.base.tensors[path])
    module = chance.choice(sorted({tensor.name.rpartition(".")[0] for tensor in tensors}))
    parts = {tensor.name.rpartition(".")[2]: tensor for tensor in tensors if tensor.name.startswith(f"{module}.")}
    layout: dict[str, int] = {}
    kind = chance.choice(TENSOR_CHANGES)
    made.kinds.append(kind.__name__)
    if kind in WHOLE_FILE:
        kind(chance, tensors, layout)
    else:
        kind(chance, parts["rows"], parts["cols"], parts["values"])
    made.put(path, encoded(tensors, **layout))


def overlapping_masks(chance: Choices, made: Mutant) -> None:
    """Gives one task the positions of another, in one module or in all."""
    source, target = made.base.task_files[:2] if chance.number(2) else made.base.task_files[1::-1]
    tensors = copy.deepcopy(made.base.tensors[target])
    given = {tensor.name: tensor for tensor in made.base.tensors[source]}
    everywhere, module = chance.number(2), chance.choice(sorted(given)).rpartition(".")[0]
    for tensor in tensors:
        if not tensor.name.endswith(".values") and (everywhere or tensor.name.startswith(f"{module}.")):
            count = len(tensor.data)
            tensor.data[:] = given[tensor.name].data[:count].ljust(count, b"\0")
    made.put(target, encoded(tensors))


# --- the folder -------------------------------------------------------------------------------------------------------


def special(chance: Choices, made: Mutant) -> None:
    """Something else in place of a file: nothing, a folder, a pipe, a link out of the checkpoint, a link to itself."""
    path = chance.choice([*made.base.files, MANIFEST])
    entry = chance.choice(
        [("missing",), ("folder",), ("pipe",), ("link", "/etc/passwd"), ("link", path), ("link", "x" * 300)]
    )
    made.entries[path] = entry


KINDS: tuple[Callable[[Choices, Mutant], None], ...] = (
    bytes_of_a_file,
    bytes_of_a_file,
    bytes_of_the_manifest,
    text_of_the_manifest,
    header_of_a_file,
    header_of_a_file,
    values_of_the_manifest,
    values_of_the_manifest,
    values_of_the_manifest,
    a_value_of_a_task,
    a_value_of_a_task,
    numbers_that_fit,
    another_a,
    tensors_of_a_task,
    tensors_of_a_task,
    tensors_of_a_task,
    overlapping_masks,
    special,
)
