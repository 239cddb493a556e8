"""A client that has never seen the proto files, as grpcurl: services, messages and calls by reflection alone."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraf_serve.v1 import generation_pb2
from tests.loraf_serve.fake_backend import expected_text
from tests.loraf_serve.harness import serving


@pytest.fixture(scope="module")
def running():
    with serving(reflection=True) as server:
        yield server


@pytest.fixture
def database(running):
    with grpc.insecure_channel(running.address) as channel:
        yield ProtoReflectionDescriptorDatabase(channel)


def test_services_are_listed(database):
    services = database.get_services()
    assert {
        "loraf.v1.GenerationService",
        "loraf.v1.AdapterService",
        "loraf.v1.InfoService",
        "grpc.health.v1.Health",
    } <= set(services)
    pool = DescriptorPool(database)
    for name in services:
        assert pool.FindServiceByName(name).methods_by_name


def test_the_request_is_described_as_in_the_proto_file(database):
    described = DescriptorPool(database).FindMessageTypeByName("loraf.v1.StreamGenerateRequest")
    own = generation_pb2.StreamGenerateRequest.DESCRIPTOR

    def layout(message, seen=()):
        return {
            field.name: (
                field.number,
                field.type,
                layout(field.message_type, (*seen, message.full_name))
                if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.full_name not in seen
                else None,
            )
            for field in message.fields
        }

    assert layout(described) == layout(own) and "sampling" in layout(described)


def test_a_call_with_messages_made_from_json(running, database):
    method = DescriptorPool(database).FindServiceByName("loraf.v1.GenerationService").methods_by_name["StreamGenerate"]
    assert method.server_streaming
    Request, Response = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
    request = json_format.Parse(
        '{"prompt": "hello", "taskSelection": {"asTrained": {"name": "nlu"}}, "sampling": {"maxTokens": 5, "n": 2}}',
        Request(),
    )
    with grpc.insecure_channel(running.address) as channel:
        call = channel.unary_stream(
            "/loraf.v1.GenerationService/StreamGenerate", Request.SerializeToString, Response.FromString
        )
        choices = [choice for message in call(request) for choice in message.choices]
    passed = running.backend.requests[-1]
    assert str(passed.task_set) == "math+nlu"
    for index in range(2):
        assert "".join(c.text for c in choices if c.index == index) == expected_text(passed, index)
