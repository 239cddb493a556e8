"""A server that speaks vLLM's contract, and its stubs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraf_serve.vllm_proto import control_pb2_grpc, inference_pb2
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb
from loraf_serve.vllm_proto.inference_pb2_grpc import InferenceStub
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import Running, serving, two_adapters

MODEL = "org/stand-in"


@dataclass(frozen=True)
class Stand:
    running: Running
    inference: InferenceStub
    control: control_pb2_grpc.ControlStub

    @property
    def backend(self):
        return self.running.backend


@contextmanager
def speaking(backend=FakeBackend, adapters=None, **options) -> Iterator[Stand]:
    adapters = two_adapters() if adapters is None else adapters
    with serving(backend, adapters, vllm_grpc=True, model=MODEL, **options) as running:
        yield Stand(running, InferenceStub(running.channel), control_pb2_grpc.ControlStub(running.channel))


def asked(text: str = "hello", **fields) -> vllm_pb.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, **fields)


def joined(pieces) -> tuple[str, list[int]]:
    """Text and token ids of a stream with one answer."""
    outputs = [piece.outputs for piece in pieces]
    return "".join(output.text for output in outputs), [token for output in outputs for token in output.token_ids]
