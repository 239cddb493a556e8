"""A checkpoint read by the description of its format, slowly: one number after the other, nothing shared with loraf.

It follows docs/reference/checkpoint-format.md. Whatever it reads is a valid checkpoint, and ΔW is computed by the
formula. It knows no limits but those of the format, so it may read what loraf refuses. It may serve as the model for an
implementation in another language.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.loraf.vectors import slow_projection

GENERATOR = "philox4x32-10/normal-65536/1"
MOST_NUMBERS = 1 << 13  # of one A, which takes a second
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z", re.ASCII)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "U16": 2, "I32": 4}
_CODES = {"F16": "e", "F32": "f", "U8": "B", "U16": "H", "I32": "i"}
_PARTS = ("rows", "cols", "values")

Matrix = dict[tuple[int, int], float]  # (row, column) → value


class NotACheckpoint(Exception):
    """What is wrong with it."""


class TooLarge(Exception):
    """It may be a checkpoint, but to compute its A by definition would take too long."""


@dataclass(frozen=True)
class SlowCheckpoint:
    """Attributes:
    b: task → module → its values.
    """

    manifest: dict[str, Any]
    b: dict[str, dict[str, Matrix]]

    def delta(self, module: str, weights: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ΔW of a module, (d_out, d_in) float64, and a bound: the sum of the absolute values of its terms."""
        spec, rank, projection = self.manifest["modules"][module], self.manifest["rank"], self.manifest["projection"]
        a = np.array(matrix_a(projection["seed"], module, rank, spec["d_in"], projection.get("init_std")))
        summed = np.zeros((spec["d_out"], rank))
        for task in self.manifest["tasks"]:
            scale = weights.get(task["name"], 0.0) * float(task["alpha"]) / rank
            if scale:
                for (row, column), value in self.b[task["name"]][module].items():
                    summed[row, column] += scale * value
        return summed @ a, np.abs(summed) @ np.abs(a)


def read(folder: Path, names: tuple[str, ...] = ()) -> SlowCheckpoint:
    """Reads and verifies a checkpoint, or only some of its tasks. Raises NotACheckpoint, TooLarge."""
    manifest = _manifest(folder / "loraf.json")
    unknown = set(names) - {task["name"] for task in manifest["tasks"]}
    _require(not unknown, f"no task {unknown}")
    tasks = [task for task in manifest["tasks"] if not names or task["name"] in names]
    try:
        for module, spec in manifest["modules"].items():
            _require_a(manifest, module, spec)
    except (TypeError, ArithmeticError, struct.error) as error:
        raise NotACheckpoint(f"no A ({type(error).__name__}: {error})") from None
    b = {task["name"]: _task(folder, manifest, task) for task in tasks}
    for module in manifest["modules"]:
        owned: set[tuple[int, int]] = set()
        for task in tasks:
            _require(not owned & b[task["name"]][module].keys(), f"{module}: masks overlap")
            owned |= b[task["name"]][module].keys()
    return SlowCheckpoint(manifest | {"tasks": tasks}, b)


# A seed of 1 and one of `true` or 1.0 are equal, but do not make the same A.
_cache_by_type = lru_cache(maxsize=None, typed=True)


@_cache_by_type
def matrix_a(seed: int, module: str, rank: int, d_in: int, std: float | None) -> list[list[float]]:
    """A of one module, by its definition."""
    return slow_projection.matrix(_quantiles(), seed, module, rank, d_in, std)


@cache
def _quantiles() -> list[float]:
    return slow_projection.table()


@_cache_by_type
def _digest_of_a(seed: int, module: str, rank: int, d_in: int, std: float | None) -> str:
    data = b"".join(struct.pack("<f", value) for row in matrix_a(seed, module, rank, d_in, std) for value in row)
    return hashlib.sha256(data).hexdigest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise NotACheckpoint(message)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len(dict(pairs)) == len(pairs), "a key stands twice")
    return dict(pairs)


def _number(text: str) -> float:
    _require(math.isfinite(float(text)), "a number is not finite")
    return float(text)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise NotACheckpoint(f"not JSON ({error})") from None


def _content(path: Path) -> bytes:
    _require(os.path.isfile(path), f"{path.name} is not a file")
    return path.read_bytes()


def _sha256(content: Any) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError:
        raise NotACheckpoint("text that UTF-8 cannot encode") from None


def _manifest(path: Path) -> dict[str, Any]:
    manifest = _json(_content(path))
    try:
        _check_manifest(manifest)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, ArithmeticError) as error:
        raise NotACheckpoint(f"malformed ({type(error).__name__}: {error})") from None
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    stated = manifest["digest"]
    _require(stated == _sha256({key: value for key, value in manifest.items() if key != "digest"}), "digest")
    projection, modules, tasks = manifest["projection"], manifest["modules"], manifest.setdefault("tasks", [])
    version = manifest["format_version"]
    _require(manifest["format"] == "loraf" and type(version) is int and version in (1, 2), "another format")
    if version == 1:
        _require("sets" not in manifest and not any("statistics" in task for task in tasks), "version 1")
    std = projection.get("init_std")
    covered = {
        "rank": manifest["rank"],
        "projection": {**{name: projection[name] for name in ("generator", "seed", "sha256")}, "init_std": std},
        "modules": {name: [module["d_out"], module["d_in"]] for name, module in modules.items()},
        "tasks": [[task["name"], float(task["alpha"]), task["file"]["sha256"]] for task in tasks],
    }
    covered["projection"]["init_std"] = None if std is None else float(std)
    _require(manifest["adapter_digest"] == _sha256(covered), "adapter_digest")
    _require(projection["generator"] == GENERATOR, "another generator")
    lines = "".join(f"{name} {modules[name]['projection_sha256']}\n" for name in sorted(modules))
    _require(projection["sha256"] == hashlib.sha256(lines.encode("utf-8")).hexdigest(), "projection.sha256")
    names = [task["name"] for task in tasks]
    _require(len(set(names)) == len(names) and all(map(_is_name, names)), "names of tasks")
    sizes = [manifest["rank"], *(spec[side] for spec in modules.values() for side in ("d_out", "d_in"))]
    _require(all(type(size) is int and size > 0 for size in sizes) and bool(modules), "rank or shapes")
    for task in tasks:
        _require(task["file"]["path"] == f"tasks/{task['name']}.safetensors", "path")
        _require(0 <= task["sparsity"] < 1 and math.isfinite(task["alpha"]), "sparsity or alpha")
        kept = (1 - Fraction(str(task["sparsity"]))) * manifest["rank"]
        expected = {name: math.floor(kept * spec["d_out"]) for name, spec in modules.items()}
        _require(task["k"] == expected and {*map(type, task["k"].values())} == {int}, "K")
    for name, weights in manifest.get("sets", {}).items():
        _require(_is_name(name) and name not in names and len(weights) > 0, "name of a set")
        _require(all(task in names and abs(weight) <= 16 for task, weight in weights.items()), "weights of a set")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and _NAME.match(name) is not None and name not in ("all", "base")


def _require_a(manifest: dict[str, Any], module: str, spec: dict[str, Any]) -> None:
    projection, rank = manifest["projection"], manifest["rank"]
    if rank * spec["d_in"] > MOST_NUMBERS:
        raise TooLarge
    digest = _digest_of_a(projection["seed"], module, rank, spec["d_in"], projection.get("init_std"))
    _require(spec["projection_sha256"] == digest, f"{module}: A has another digest")


def _task(folder: Path, manifest: dict[str, Any], task: dict[str, Any]) -> dict[str, Matrix]:
    try:
        data = _content(folder / task["file"]["path"])
        _require(len(data) == task["file"]["bytes"], "size of a task's file")
        _require(hashlib.sha256(data).hexdigest() == task["file"]["sha256"], "SHA-256 of a task's file")
        tensors = _tensors(data)
        expected = {f"{module}.{part}" for module in manifest["modules"] for part in _PARTS}
        _require(set(tensors) == expected, "tensors")
        return {module: _matrix(manifest, task, tensors, module) for module in manifest["modules"]}
    except (LookupError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise NotACheckpoint(f"malformed ({type(error).__name__}: {error})") from None


def _tensors(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Returns name → dtype, shape and bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    _require(8 + length <= len(data), "length of the header")
    header, rest = _json(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", None) or {}
    _require(all(isinstance(value, str) for value in metadata.values()), "metadata")
    end, tensors = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        _require(entry.keys() == {"dtype", "shape", "data_offsets"}, "fields of a tensor")
        first, last = entry["data_offsets"]
        numbers = [first, last, *entry["shape"]]
        _require(all(type(number) is int and number >= 0 for number in numbers), "numbers of a tensor")
        _require(first == end and last - first == _SIZES[entry["dtype"]] * math.prod(entry["shape"]), "offsets")
        tensors[name], end = (entry["dtype"], entry["shape"], rest[first:last]), last
    _require(end == len(rest), "bytes that belong to no tensor")
    return tensors


def _matrix(manifest: dict[str, Any], task: dict[str, Any], tensors: dict[str, Any], module: str) -> Matrix:
    d_out, rank, k = manifest["modules"][module]["d_out"], manifest["rank"], task["k"][module]
    rows, columns, values = (tensors[f"{module}.{part}"] for part in _PARTS)
    for (dtype, shape, _), expected in ((rows, _index(d_out)), (columns, _index(rank)), (values, None)):
        _require(shape == [k] and dtype == (expected or _DTYPES[task["dtype"]]), f"{module}: shape or dtype")
    positions = list(zip(_numbers(rows), _numbers(columns), strict=True))
    _require(all(0 <= row < d_out and 0 <= column < rank for row, column in positions), f"{module}: outside")
    _require(all(a < b for a, b in zip(positions, positions[1:], strict=False)), f"{module}: not in order")
    numbers = _numbers(values)
    _require(all(map(math.isfinite, numbers)), f"{module}: not finite")
    return dict(zip(positions, numbers, strict=True))


def _index(size: int) -> str:
    return "U8" if size <= 256 else "U16" if size <= 65_536 else "I32"


def _numbers(tensor: tuple[str, list[int], bytes]) -> list[Any]:
    dtype, shape, data = tensor
    if dtype == "BF16":  # the upper half of a float32
        halves = struct.unpack(f"<{shape[0]}H", data)
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    return list(struct.unpack(f"<{shape[0]}{_CODES[dtype]}", data))
