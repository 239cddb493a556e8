"""The safetensors format, read strictly: eight bytes with the length of a JSON header, the header, the tensors' bytes.

safetensors' own reader copies every tensor while it holds the GIL, and accepts a header with a duplicate key. Whatever
is accepted here, safetensors reads in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from loraf.files import strict_json
from loraf.files.strict_json import LONGEST_NAME, shown
from loraf.limits import MAX_HEADER_BYTES

_TOO_LARGE = 1 << 63  # bytes of a tensor; also without a dimension that is zero, since torch multiplies the others
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


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        first, last: its first byte, and one past its last, counted from the end of the header.
    """

    name: str
    first: int
    last: int
    dtype: torch.dtype
    shape: list[int]


def encode(tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """Encodes contiguous tensors as a file, in this order. Each must begin at a multiple of its item size."""
    tensors = list(tensors)
    header_fields, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header_fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = strict_json.dumps(header_fields)
    header += b" " * (-len(header) % _HEADER_UNIT)
    return b"".join([len(header).to_bytes(8, "little"), header, *(bytes_of(tensor) for _, tensor in tensors)])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor."""
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data


def parse(data: memoryview, most: int = MAX_HEADER_BYTES) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file. They share the (writable) memory of `data` where it is aligned for them.

    Args:
        most: as in `header_end`.

    Raises:
        ValueError: not a valid safetensors file.
    """
    start = header_end(data[:8], len(data), most)
    return {
        entry.name: tensor_at(data, start + entry.first, start + entry.last, entry.dtype, entry.shape)
        for entry in parse_header(data[8:start], len(data) - start)
    }


def header_end(beginning: bytes | memoryview, size: int, most: int = MAX_HEADER_BYTES) -> int:
    """Returns the offset at which the tensors begin in a file of `size` bytes. Raises ValueError.

    Args:
        beginning: the first eight bytes of the file.
        most: the largest header to accept, in bytes; safetensors' own limit is 100 MB.
    """
    if len(beginning) < 8:
        raise ValueError("it is too short to hold a header")
    length = int.from_bytes(beginning, "little")
    if length > most or 8 + length > size:
        raise ValueError(f"a header of {length} bytes does not fit")
    return 8 + length


def parse_header(text: bytes | memoryview, size: int) -> list[Entry]:
    """Returns the tensors that a header lists, in the order of their bytes.

    Args:
        size: number of bytes after the header.

    Raises:
        ValueError: invalid. The header must be strict JSON, every entry well-formed, and the tensors must cover those
            bytes exactly, without gaps or overlaps.
    """
    header = strict_json.loads(bytes(text))
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map names to text")
    entries = sorted((_entry(name, fields) for name, fields in header.items()), key=lambda e: (e.first, e.last))
    end = 0
    for entry in entries:
        if entry.first != end:
            raise ValueError(f"the bytes of {shown(entry.name, LONGEST_NAME)} do not follow those of the tensor before")
        end = entry.last
    if end != size:
        raise ValueError(f"the tensors take {end} bytes of {size}")
    return entries


def _entry(name: str, fields: Any) -> Entry:
    """Raises ValueError."""
    label = shown(name, LONGEST_NAME)
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise ValueError(f"{label} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{label} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{label} has a shape or data_offsets that are not lists")
    numbers = [*shape, *offsets]
    if {*map(type, numbers)} != {int} or not 0 <= min(numbers) <= max(numbers) < 1 << 63:
        raise ValueError(f"{label} has a shape or data_offsets with an invalid number")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{label} has {len(shape)} dimensions")
    if _DTYPES[dtype].itemsize * math.prod(filter(None, shape)) >= _TOO_LARGE:
        raise ValueError(f"{label} has a shape that no memory can hold")
    size = _DTYPES[dtype].itemsize * math.prod(shape)
    first, last = offsets
    if size != last - first:
        raise ValueError(f"{label} takes {size} bytes, but its data_offsets span {last - first}")
    return Entry(name, first, last, _DTYPES[dtype], shape)


def tensor_at(data: memoryview, first: int, last: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Returns the tensor in the bytes from `first` to `last`. It shares their memory where that is aligned for it."""
    if first == last:  # torch.frombuffer refuses empty buffers
        return torch.empty(shape, dtype=dtype)
    buffer: memoryview | bytearray = data
    if first % dtype.itemsize:  # torch needs numbers at multiples of their size
        buffer, first, last = bytearray(data[first:last]), 0, last - first
    vector = torch.frombuffer(buffer, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first)
    return vector if len(shape) == 1 else vector.view(shape)
