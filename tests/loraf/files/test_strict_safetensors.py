"""The strict safetensors parser agrees with safetensors, and accepts nothing that safetensors refuses."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraf.files import strict_safetensors

DTYPES = list(strict_safetensors._DTYPES.values())


def parse(data: bytes) -> dict[str, torch.Tensor]:
    return strict_safetensors.parse(memoryview(bytearray(data)))


def written(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> tuple:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
        return tensor.dtype, tensor.shape, raw.tolist()

    return {name: bits(t) for name, t in left.items()} == {name: bits(t) for name, t in right.items()}


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    def tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
        size = dtype.itemsize * torch.Size(shape).numel()
        if not size:
            return torch.empty(shape, dtype=dtype)
        low, high = (0, 1) if dtype == torch.bool else (0, 255)
        raw = draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
        return torch.tensor(raw, dtype=torch.uint8).view(dtype).view(shape)

    kinds = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3))
    return {name: tensor(*kind) for name, kind in draw(st.dictionaries(NAMES, kinds, max_size=5)).items()}


@settings(max_examples=100, deadline=None)
@given(
    tensors(), st.one_of(st.none(), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("x")))
)
def test_files_written_by_safetensors_read_the_same(several, notes):
    assume(several or notes is None)  # safetensors 0.8 writes `{},"__metadata__":…` then, and cannot read it either
    data = safetensors.torch.save(several, notes)
    assert same(parse(data), several)
    assert same(parse(data), safetensors.torch.load(data))


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(0, 7))
def test_headers_of_any_length_are_read(several, padding):
    """Unpadded headers put numbers at odd addresses. safetensors itself pads its headers."""
    data = safetensors.torch.save(several)
    length = int.from_bytes(data[:8], "little")
    odd = written(data[8 : 8 + length].rstrip() + b" " * padding, data[8 + length :])
    assert same(parse(odd), several)


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@st.composite
def headers(draw):
    """Entries that fit together, or almost."""
    entries, at = {}, 0
    for i in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(["U8", "U16", "F32", "XX"] if draw(st.integers(0, 5)) == 0 else ["U8", "U16"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        size = {"U8": 1, "U16": 2, "F32": 4, "XX": 1}[dtype] * torch.Size(shape).numel()
        slip = draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1]))
        entries[f"t{draw(st.integers(0, 99))}.{i}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at + slip, at + slip + size + draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1]))],
        }
        at += size
    return entries, max(0, at + draw(st.sampled_from([0, 0, 0, 0, -1, 1])))


@settings(max_examples=400, deadline=None)
@given(headers())
def test_nothing_is_accepted_that_safetensors_refuses(case):
    entries, size = case
    data = written(json.dumps(entries).encode(), bytes(range(size)))
    try:
        tensors = parse(data)
    except ValueError:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)
    else:
        assert same(tensors, safetensors.torch.load(data))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), "duplicate key 'a'"),  # safetensors accepts it
        (b'{"a":["U8",[4],[0,4]]}', "does not have exactly dtype"),  # and this too
        (json.dumps({"a": ENTRY | {"extra": 1}}).encode(), "does not have exactly dtype"),  # and this too
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "duplicate key 'dtype'"),
        (json.dumps({"a": ENTRY | {"shape": [4.0]}}).encode(), "invalid number"),
        (json.dumps({"a": ENTRY | {"shape": [True, 4]}}).encode(), "invalid number"),
        (json.dumps({"a": ENTRY | {"shape": [-2, -2]}}).encode(), "invalid number"),
        (json.dumps({"a": ENTRY | {"shape": [2**64, 0]}}).encode(), "invalid number"),
        (
            json.dumps({"a": ENTRY | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}).encode(),
            "no memory can hold",
        ),
        (
            json.dumps({"a": ENTRY | {"shape": [0] + [2**62] * 3, "data_offsets": [0, 0]}}).encode(),
            "no memory can hold",
        ),
        (json.dumps({"a": ENTRY | {"shape": None}}).encode(), "are not lists"),
        (json.dumps({"a": ENTRY | {"shape": [4] + [1] * 64}}).encode(), "65 dimensions"),
        (json.dumps({"a": ENTRY | {"data_offsets": [0, 2, 4]}}).encode(), "are not lists"),
        (json.dumps({"a": ENTRY | {"data_offsets": [4, 0]}}).encode(), "data_offsets span -4"),
        (json.dumps({"a": ENTRY | {"dtype": ["U8"]}}).encode(), "unknown dtype"),
        (json.dumps({"a": ENTRY | {"dtype": "F4"}}).encode(), "unknown dtype"),
        (json.dumps({"a": ENTRY, "b": ENTRY}).encode(), "do not follow"),
        (json.dumps({"a": ENTRY, "__metadata__": {"x": 1}}).encode(), "__metadata__"),
        (json.dumps({"a": ENTRY, "__metadata__": ["x"]}).encode(), "__metadata__"),
        (json.dumps([ENTRY]).encode(), "not an object"),
        (b"{}", "take 0 bytes of 4"),
        (b"{" * 100_000, "is nested too deeply|Expecting"),
        (b"\xff{}", "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_a_malformed_header_is_refused(header, says):
    with pytest.raises(ValueError, match=says):
        parse(written(header, bytes(4)))
