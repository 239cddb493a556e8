"""The tensors of a task's file, and changes of them that leave a well-formed file: wrong are only its contents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.loraf.hostile_changes import Choices

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U16": 2, "U8": 1, "BOOL": 1}
NOT_FINITE = {"BF16": b"\x80\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\x80\xff"}
OTHER_NAMES = ["../../x", "/etc/passwd", "", "\x1b[31m", "x\ny", "a" * 3000, "__metadata__", "math.rows", "rows"]


@dataclass
class Tensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytearray

    @property
    def item(self) -> int:
        return SIZES[self.dtype]


def tensors_of(data: bytes) -> list[Tensor]:
    """The tensors of a file, in the order of their bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [
        Tensor(name, entry["dtype"], entry["shape"], bytearray(data[end + first : end + last]))
        for name, entry in order
        for first, last in [entry["data_offsets"]]
    ]


def encoded(tensors: Sequence[Tensor], gap: int = 0, overlap: int = 0, spaces: int = 0) -> bytes:
    """A file of these tensors. `gap`: unused bytes between two; `overlap`: bytes that two share."""
    header, at, content = {}, 0, b""
    for tensor in tensors:
        at = max(0, at + gap - overlap)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + len(tensor.data)],
        }
        content = content[:at].ljust(at, b"\0") + tensor.data
        at += len(tensor.data)
    text = json.dumps(header).encode() + b" " * spaces
    return len(text).to_bytes(8, "little") + text + content


def _entry(tensor: Tensor, at: int) -> slice:
    return slice(at * tensor.item, (at + 1) * tensor.item)


def _index(chance: Choices, tensor: Tensor) -> int:
    return chance.number(max(1, len(tensor.data) // tensor.item))


def swap_positions(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    one, other = _index(chance, rows), _index(chance, rows)
    for tensor in (rows, cols):
        first, second = _entry(tensor, one), _entry(tensor, other)
        tensor.data[first], tensor.data[second] = tensor.data[second], tensor.data[first]


def repeat_a_position(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    at = _index(chance, rows)
    for tensor in (rows, cols):
        tensor.data[_entry(tensor, at)] = tensor.data[_entry(tensor, max(0, at - 1))]


def another_coordinate(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    tensor = chance.choice([rows, cols])
    number = chance.choice([0, 1, 3, 4, 11, 12, 255, 256, 299, 300, 65_535]) % (1 << 8 * tensor.item)
    tensor.data[_entry(tensor, _index(chance, tensor))] = number.to_bytes(tensor.item, "little")


def another_value(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    at = _entry(values, _index(chance, values))
    values.data[at] = chance.choice([bytes(values.item), NOT_FINITE[values.dtype], chance.take(4)])[: values.item]


def another_dtype(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    """The same bytes as another type of the same size, or as many numbers of another size."""
    tensor = chance.choice([rows, cols, values])
    count = len(tensor.data) // tensor.item
    tensor.dtype = chance.choice(sorted(SIZES))
    if chance.number(2):
        tensor.data = bytearray(count * tensor.item)
        tensor.data[: tensor.item] = b"\1" * tensor.item
    tensor.shape = [len(tensor.data) // tensor.item]


def another_count(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    """One number more, one less, or none; in all three tensors or in one."""
    kind = chance.number(3)
    for tensor in (rows, cols, values) if chance.number(2) else (chance.choice([rows, cols, values]),):
        if kind == 0:
            tensor.data += tensor.data[-tensor.item :]
        elif kind == 1:
            del tensor.data[-tensor.item :]
        else:
            tensor.data.clear()
        tensor.shape = [len(tensor.data) // tensor.item]


def another_shape(chance: Choices, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    tensor = chance.choice([rows, cols, values])
    count = len(tensor.data) // tensor.item
    tensor.shape = chance.choice(
        [[count, 1], [1, count], [count, 1, 1], [], [2**31, 0], [2**62], [-count], [1] * 65, [0], [True]]
    )


def another_name(chance: Choices, tensors: list[Tensor], layout: dict[str, int]) -> None:
    chance.choice(tensors).name = chance.choice(OTHER_NAMES)


def one_more(chance: Choices, tensors: list[Tensor], layout: dict[str, int]) -> None:
    tensors.insert(chance.number(len(tensors)), Tensor(chance.choice(OTHER_NAMES), "F32", [1], bytearray(4)))


def one_less(chance: Choices, tensors: list[Tensor], layout: dict[str, int]) -> None:
    del tensors[chance.number(len(tensors))]


def another_order(chance: Choices, tensors: list[Tensor], layout: dict[str, int]) -> None:
    for _ in range(chance.randint(1, 5)):
        tensors.append(tensors.pop(chance.number(len(tensors))))


def gaps(chance: Choices, tensors: list[Tensor], layout: dict[str, int]) -> None:
    layout[chance.choice(["gap", "overlap", "spaces"])] = chance.choice([1, 2, 8, 4096])


WHOLE_FILE: tuple[Callable[..., None], ...] = (another_name, one_more, one_less, another_order, gaps)
TENSOR_CHANGES: tuple[Callable[..., None], ...] = (
    swap_positions,
    repeat_a_position,
    another_coordinate,
    another_coordinate,
    another_value,
    another_value,
    another_dtype,
    another_count,
    another_shape,
    *WHOLE_FILE,
)
