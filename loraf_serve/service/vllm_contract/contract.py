"""Adds vLLM's contract to a server."""

from __future__ import annotations

from grpc import aio

from loraf_serve.service.doors import Inside
from loraf_serve.service.services import AdapterService
from loraf_serve.service.vllm_contract.control import ControlService
from loraf_serve.service.vllm_contract.inference import InferenceService
from loraf_serve.service.vllm_contract.running import RunningRequests
from loraf_serve.vllm_proto import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc


def add(server: aio.Server, inside: Inside, adapters: AdapterService) -> tuple[str, ...]:
    """Adds the services. Returns their names, for health checks and reflection."""
    running = RunningRequests()
    inference = InferenceService(inside.generations, inside.options, running)
    control = ControlService(inside, adapters, running)
    # Generated code for services has no types, hence the ignores.
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)  # type: ignore[no-untyped-call]
    control_pb2_grpc.add_ControlServicer_to_server(control, server)  # type: ignore[no-untyped-call]
    return (
        inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
        control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
    )
