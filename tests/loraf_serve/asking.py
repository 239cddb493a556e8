"""Makes requests to the test server, and reads its refusals."""

from __future__ import annotations

import base64
import urllib.parse

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb


def ask(*args, **kwargs) -> pb.GenerateRequest:
    return request_of(pb.GenerateRequest, *args, **{"adapter": "trio", **kwargs})


def ask_stream(*args, **kwargs) -> pb.StreamGenerateRequest:
    return request_of(pb.StreamGenerateRequest, *args, **{"adapter": "trio", **kwargs})


def failure(call) -> grpc.RpcError:
    """The error that `call()` raises."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def metadata_bytes(error: grpc.RpcError) -> int:
    """Size of the status on the wire: the message percent-encoded, the details in base64."""
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    return len(urllib.parse.quote(error.details())) + len(base64.b64encode(details))


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Field → description of each violation in an INVALID_ARGUMENT error."""
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in rpc_status.from_call(error).details)
    return {v.field: v.description for v in bad_request.field_violations}
