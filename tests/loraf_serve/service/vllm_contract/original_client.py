"""A client whose stubs are generated from vLLM's own proto files. Runs in a process of its own and imports nothing of
LoRAF: both have messages of the same names.

    python original_client.py STUBS ADDRESS < requests.json > answers.json
"""

from __future__ import annotations

import json
import sys

sys.path.insert(0, sys.argv[1])

import control_pb2
import control_pb2_grpc
import grpc
import inference_pb2
import inference_pb2_grpc
from google.protobuf.json_format import MessageToDict, ParseDict


def main() -> None:
    channel = grpc.insecure_channel(sys.argv[2])
    stubs = {
        "Inference": (inference_pb2_grpc.InferenceStub(channel), inference_pb2),
        "Control": (control_pb2_grpc.ControlStub(channel), control_pb2),
    }
    answers = []
    for service, method, message, fields in json.load(sys.stdin):
        stub, messages = stubs[service]
        request = ParseDict(fields, getattr(messages, message)())
        call = getattr(stub, method)
        try:
            responses = list(call(request)) if method == "GenerateStream" else [call(request)]
            answers.append([MessageToDict(response, preserving_proto_field_name=True) for response in responses])
        except grpc.RpcError as error:
            answers.append(error.code().name)
    json.dump(answers, sys.stdout)


main()
