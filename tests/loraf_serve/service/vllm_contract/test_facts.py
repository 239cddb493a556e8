"""Our part of vLLM's contract has the names, numbers and types of vLLM 0.32.0 (facts.txt)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from loraf_serve.vllm_proto import control_pb2, inference_pb2

FACTS = [
    line for line in (Path(__file__).parent / "facts.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"
]
FILES = (inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)
TYPES = {
    value: name.removeprefix("TYPE_").lower() for name, value in vars(FieldDescriptor).items() if name[:5] == "TYPE_"
}


def kind(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return f"map {kind(entry['key'])} {kind(entry['value'])}"
    named = field.message_type or field.enum_type
    plain = named.full_name if named else TYPES[field.type]
    one = field.containing_oneof
    is_optional = one is not None and one.name == f"_{field.name}"  # how protoc writes `optional`
    choice = f" of {one.name}" if one is not None and not is_optional else ""
    return f"{'repeated ' if field.is_repeated else 'optional ' if is_optional else ''}{plain}{choice}"


def of_message(message: Descriptor, name: str) -> Iterator[str]:
    for field in message.fields:
        yield f"{name}.{field.name} = {field.number}: {kind(field)}"
    if not message.fields:
        yield f"{name}: no fields"
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            yield from of_message(nested, f"{name}.{nested.name}")
    for enum in message.enum_types:
        yield from of_enum(enum, f"{name}.{enum.name}")


def of_enum(enum: EnumDescriptor, name: str) -> Iterator[str]:
    for value in enum.values:
        yield f"{name}.{value.name} = {value.number}"


def ours() -> Iterator[str]:
    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from of_message(message, message.name)
        for enum in file.enum_types_by_name.values():
            yield from of_enum(enum, enum.name)
        for service in file.services_by_name.values():
            for method in service.methods:
                stream = "stream " if method.server_streaming else ""
                types = f"({method.input_type.full_name}) -> {stream}{method.output_type.full_name}"
                yield f"{service.name}.{method.name}{types}"


def test_everything_that_we_have_is_as_vllm_has_it():
    assert all(file.package == "vllm" for file in FILES)
    assert sorted(set(ours()) - set(FACTS)) == []


def test_a_message_that_we_have_has_all_of_its_fields():
    messages = {name for file in FILES for name in (*file.message_types_by_name, *file.enum_types_by_name)}
    theirs = {fact for fact in FACTS if fact.replace(":", ".").partition(".")[0] in messages}
    assert sorted(theirs - set(ours())) == []


def test_all_of_inference_is_there():
    assert [fact for fact in FACTS if fact.startswith("Inference.") and fact not in set(ours())] == []


def test_the_task_set_stands_in_field_15():
    field = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name["lora_name"]
    assert (field.number, field.type) == (15, FieldDescriptor.TYPE_STRING)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_stubs_are_not_in_the_way_of_the_module_vllm(file):
    assert file.name.startswith("loraf_serve/vllm_proto/")
